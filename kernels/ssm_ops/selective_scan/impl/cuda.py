"""Selective scan by the compiled CUDA library (csrc/cuda/selective_scan.cuh): layouts, sizes of blocks, the launch."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from ..._native import library, pointer
from ..ops import STATE_CHUNK

_POINTERS = ("A", "D", "bias")
_RESULTS = ("out", "last", "states", "du", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC")
_SIZES = ("batch", "dim", "length", "state", "groups", "repeat")
_FLAGS = ("softplus", "vector", "wide", "wide_delta", "lanes", "warps", "device")
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

_SHARED_BYTES = 48 * 1024  # what a block gets without asking
_RUN = 8  # K of the kernels


class _Map(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("channel", ctypes.c_int64)]


class _StateMap(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((axis, ctypes.c_int64) for axis in ("batch", "group", "state"))]


class _Arguments(ctypes.Structure):
    """`ScanArguments` of selective_scan.cuh."""

    _fields_ = [
        *((name, _Map) for name in ("u", "delta", "z", "dout")),
        *((name, _StateMap) for name in ("B", "C")),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_RESULTS)),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _FLAGS),
        ("stream", ctypes.c_void_p),
    ]


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    if delta.dtype != u.dtype:
        u, B, C, z = _widened(u, B, C, z)
    u, delta, B, C, z = (_time_contiguous(x) for x in (u, delta, B, C, z))
    A, D, delta_bias = (None if x is None else x.contiguous() for x in (A, D, delta_bias))
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    chunks = -(-length // STATE_CHUNK["cuda"])
    out = u.new_empty(u.shape, dtype=out_dtype if out_dtype in (u.dtype, torch.float32) else torch.float32)
    last = torch.empty((batch, dim, n_state), device=u.device)
    states = last.new_empty((chunks + 1, batch, groups, n_state, dim // groups))
    lanes, warps = _plan(u, groups, max_warps=8, floats=lambda channels: 2 * n_state * channels)
    _launch(
        "forward",
        *(u, delta, z, None, B, C, A, D, delta_bias, delta_softplus, lanes, warps),
        *(out.dtype != u.dtype, False),
        {"out": out, "last": last, "states": states},
    )
    return out.to(out_dtype), last, states


def backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus) -> tuple[Tensor, ...]:
    """As `reference.backward`."""
    if delta.dtype != u.dtype:
        given = (u, delta, A, B, C, D, z, delta_bias)
        u, B, C, z = _widened(u, B, C, z)
        grads = backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus)
        return tuple(g.to(given[0].dtype if x is None else x.dtype) for x, g in zip(given, grads, strict=True))
    dout = dout if dout.dtype in (u.dtype, torch.float32) else dout.to(torch.float32)
    dout, u, delta, B, C, z = (_time_contiguous(x) for x in (dout, u, delta, B, C, z))
    A, D, delta_bias = (None if x is None else x.contiguous() for x in (A, D, delta_bias))
    (batch, dim, _), (groups, n_state) = u.shape, B.shape[1:3]
    repeat = dim // delta.shape[1]
    lanes, warps = _plan(
        u,
        groups,
        max_warps=8 if z is None else 4,  # BACKWARD_THREADS, GATED_THREADS of the kernels
        floats=lambda channels: 4 * n_state * channels + 1024,
    )
    blocks = -(-dim // groups // (warps * 32 // lanes))

    du, dz = u.new_empty(u.shape), None if z is None else z.new_empty(z.shape)
    ddelta = u.new_empty(u.shape, dtype=u.dtype if repeat == 1 else torch.float32)
    dA, (dB, dC) = states.new_empty((batch, dim, n_state)), (states.new_empty((blocks, *x.shape)) for x in (B, C))
    dD, dbias = (None if x is None else states.new_empty((batch, dim)) for x in (D, delta_bias))
    results = {"du": du, "ddelta": ddelta, "dz": dz, "dA": dA, "dD": dD, "dbias": dbias, "dB": dB, "dC": dC}
    _launch(
        "backward",
        *(u, delta, z, dout, B, C, A, D, delta_bias, delta_softplus, lanes, warps),
        *(dout.dtype != u.dtype, ddelta.dtype != u.dtype),
        results | {"states": states},
    )
    absent = [u.new_empty(0) for _ in range(3)]  # three, for the outputs of an operator may not share memory
    return (
        du,
        ddelta if repeat == 1 else ddelta.unflatten(1, (-1, repeat)).sum(2).to(delta.dtype),
        dA.sum(0),
        _sum_blocks(dB, B.dtype),
        _sum_blocks(dC, C.dtype),
        absent[0] if D is None else dD.sum(0),
        absent[1] if z is None else dz,
        absent[2] if delta_bias is None else dbias.sum(0).unflatten(0, (-1, repeat)).sum(1),
    )


def _launch(direction, u, delta, z, dout, B, C, A, D, bias, softplus, lanes, warps, wide, wide_delta, results) -> None:
    batch, dim, length = u.shape
    vector = _aligned_elements([x for x in (u, delta, z, dout, B, C) if x is not None], length)
    device = u.device.index
    arguments = _Arguments(
        *(_Map() if x is None else _Map(x.data_ptr(), *x.stride()[:-1]) for x in (u, delta, z, dout)),
        *(_StateMap(x.data_ptr(), *x.stride()[:-1]) for x in (B, C)),
        *(pointer(x) for x in (A, D, bias)),
        *(pointer(results.get(name)) for name in _RESULTS),
        *(batch, dim, length, A.shape[1], B.shape[1], dim // delta.shape[1]),
        *(softplus, vector, wide, wide_delta, lanes, warps, device),
        torch.cuda.current_stream(device).cuda_stream,
    )
    with torch.cuda.device(device):
        problem = getattr(library("cuda"), f"selective_scan_{direction}_{_DTYPES[u.dtype]}")(ctypes.byref(arguments))
    if problem is not None:
        raise RuntimeError(
            f"selective_scan: the CUDA {direction} kernel did not start on cuda:{device} "
            f"({torch.cuda.get_device_name(device)}): {problem.decode()}"
        )


def _widened(*maps: Tensor | None) -> list[Tensor | None]:
    """Float32 copies, for step sizes in float32: a kernel reads all its maps in one dtype."""
    return [None if x is None else x.float() for x in maps]


def _time_contiguous(x: Tensor | None) -> Tensor | None:
    """x with stride 1 along time; its other strides stay."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _aligned_elements(tensors: list[Tensor], length: int) -> int:
    """A power of 2 up to 8: all rows, also those of contiguous results, start at a multiple of so many elements."""
    elements = math.gcd(_RUN, length)
    for x in tensors:
        elements = math.gcd(elements, *(s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1))
        # vectors have 16 bytes at most, so nothing needs a start more even than that
        elements = min(elements, _RUN if x.data_ptr() % 16 == 0 else math.gcd(x.data_ptr(), 16) // x.element_size())
    return elements


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(u: Tensor, groups: int, max_warps: int, floats) -> tuple[int, int]:
    """(lanes of a channel, warps of a block). `floats(channels)` is the shared memory of a warp of so many channels."""
    batch, dim, length = u.shape
    per_group, wanted = dim // groups, 8 * _multiprocessors(u.device.index)
    # eight lanes need fewer shuffles; 32 when that leaves the GPU idle, or most of a warp
    lanes = 8
    if length > 2 * STATE_CHUNK["cuda"] and (per_group < 4 or batch * groups * -(-per_group // 4) < wanted):
        lanes = 32
    channels, warps = 32 // lanes, max_warps
    while warps > 1 and (
        warps * floats(channels) * 4 > _SHARED_BYTES  # no room
        or warps // 2 * channels >= per_group  # half of the block would have no channel
        or batch * groups * -(-per_group // (warps * channels)) < wanted // 4  # multiprocessors without a block
    ):
        warps //= 2
    return lanes, warps


def _sum_blocks(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)
