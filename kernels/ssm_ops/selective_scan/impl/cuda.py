"""Selective scan by the compiled CUDA library (csrc/cuda/selective_scan.cuh): layouts, sizes of blocks, the launch."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..._common import check_states
from ..._interface import (
    BACKWARD_ROWS,
    BACKWARD_THREADS,
    FORWARD_ROWS,
    FORWARD_THREADS,
    GATED_THREADS,
    RUN,
    SHARED_BYTES,
    SUMS,
    Buffer,
    CudaMap,
    CudaScanArguments,
    CudaStateMap,
)
from ..._native import call
from ..api import STATE_CHUNK, states_shape


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype, keep_states) -> tuple[Tensor, ...]:
    """As `reference.forward`."""
    if delta.dtype != u.dtype:
        u, B, C, z = _widened(u, B, C, z)
    u, delta, B, C, z = (_time_contiguous(x) for x in (u, delta, B, C, z))
    A, D, delta_bias = (None if x is None else x.contiguous() for x in (A, D, delta_bias))
    (batch, dim, _), (groups, n_state) = u.shape, B.shape[1:3]
    out = u.new_empty(u.shape, dtype=out_dtype if out_dtype in (u.dtype, torch.float32) else torch.float32)
    last = u.new_empty((batch, dim, n_state), dtype=torch.float32)
    shape = states_shape(u, B, "cuda") if keep_states else (0,)
    states = u.new_empty(shape, dtype=torch.float32)
    lanes, warps = _plan(u, groups, FORWARD_THREADS, lambda channels: FORWARD_ROWS * n_state * channels)
    _launch(
        "forward",
        *(u, delta, z, None, B, C, A, D, delta_bias, delta_softplus, lanes, warps),
        *(out.dtype != u.dtype, False),
        {"out": out, "last": last} | ({"states": states} if keep_states else {}),
    )
    return out.to(out_dtype), last, states


def backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus) -> tuple[Tensor, ...]:
    """As `reference.backward`."""
    check_states("selective_scan", states, states_shape(u, B, "cuda"))
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
    most_threads = BACKWARD_THREADS if z is None else GATED_THREADS
    lanes, warps = _plan(u, groups, most_threads, lambda channels: BACKWARD_ROWS * n_state * channels + 2 * SUMS)
    blocks = -(-dim // groups // (warps * 32 // lanes))

    du, dz = (None if x is None else x.new_empty(x.shape, dtype=x.dtype) for x in (u, z))
    ddelta = u.new_empty(u.shape, dtype=u.dtype if repeat == 1 else torch.float32)
    dA = u.new_empty((batch, dim, n_state), dtype=torch.float32)
    dB, dC = (u.new_empty((blocks, *x.shape), dtype=torch.float32) for x in (B, C))
    dD, dbias = (None if x is None else u.new_empty((batch, dim), dtype=torch.float32) for x in (D, delta_bias))
    results = {"du": du, "ddelta": ddelta, "dz": dz, "dA": dA, "dD": dD, "dbias": dbias, "dB": dB, "dC": dC}
    _launch(
        "backward",
        *(u, delta, z, dout, B, C, A, D, delta_bias, delta_softplus, lanes, warps),
        *(dout.dtype != u.dtype, ddelta.dtype != u.dtype),
        results | {"states": states.contiguous()},
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
    arguments = CudaScanArguments(
        *map(CudaMap.of, (u, delta, z, dout)),
        *map(CudaStateMap.of, (B, C)),
        *map(Buffer.of, (A, D, bias)),
        **{name: Buffer.of(x) for name, x in results.items()},
        **{"batch": batch, "dim": dim, "length": length, "state": A.shape[1], "groups": B.shape[1]},
        **{"repeat": dim // delta.shape[1], "softplus": softplus, "vector": vector},
        **{"wide": wide, "wide_delta": wide_delta, "lanes": lanes, "warps": warps, "device": device},
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
    try:
        with torch.cuda.device(device):
            call("cuda", f"selective_scan_{direction}_{str(u.dtype).removeprefix('torch.')}", arguments)
    except RuntimeError as error:
        raise RuntimeError(f"{error} (on cuda:{device}, {torch.cuda.get_device_name(device)})") from None


def _widened(*maps: Tensor | None) -> list[Tensor | None]:
    """Float32 copies, for step sizes in float32: a kernel reads all its maps in one dtype."""
    return [None if x is None else x.float() for x in maps]


def _time_contiguous(x: Tensor | None) -> Tensor | None:
    """x with stride 1 along time; its other strides stay."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _aligned_elements(tensors: list[Tensor], length: int) -> int:
    """A power of 2 up to 8: all rows, also those of contiguous results, start at a multiple of so many elements."""
    elements = math.gcd(RUN, length)
    for x in tensors:
        elements = math.gcd(elements, *(s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1))
        # vectors have 16 bytes at most, so nothing needs a start more even than that
        elements = min(elements, RUN if x.data_ptr() % 16 == 0 else math.gcd(x.data_ptr(), 16) // x.element_size())
    return elements


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(u: Tensor, groups: int, most_threads: int, floats) -> tuple[int, int]:
    """(lanes of a channel, warps of a block). `floats(channels)` is the shared memory of a warp of so many channels."""
    batch, dim, length = u.shape
    per_group, wanted = dim // groups, 8 * _multiprocessors(u.device.index)
    # eight lanes need fewer shuffles; 32 when that leaves the GPU idle, or most of a warp
    lanes = 8
    if length > 2 * STATE_CHUNK["cuda"] and (per_group < 4 or batch * groups * -(-per_group // 4) < wanted):
        lanes = 32
    channels, warps = 32 // lanes, most_threads // 32
    while warps > 1 and (
        warps * floats(channels) * 4 > SHARED_BYTES  # no room
        or warps // 2 * channels >= per_group  # half of the block would have no channel
        or batch * groups * -(-per_group // (warps * channels)) < wanted // 4  # multiprocessors without a block
    ):
        warps //= 2
    return lanes, warps


def _sum_blocks(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)
