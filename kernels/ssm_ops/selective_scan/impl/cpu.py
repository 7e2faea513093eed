"""Selective scan by the compiled CPU library (csrc/cpu/selective_scan.cpp). Half precision is converted around it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..._native import Map, as_float, as_map, library, pointer
from ..ops import STATE_CHUNK

_POINTERS = ("A", "D", "bias", "B", "C")
_STRIDES = tuple(f"{x}_{axis}" for x in "bc" for axis in ("batch", "group", "state", "time"))
_RESULTS = ("out", "last", "states", "du", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC")
_SIZES = ("batch", "dim", "length", "state", "groups", "parts")

# blocks of channels that may sum dB and dC side by side; fixed, so that results do not depend on the threads
_MIN_TASKS = 16


class _Arguments(ctypes.Structure):
    """`ScanArguments` of selective_scan.cpp."""

    _fields_ = [
        *((name, Map) for name in ("u", "delta", "z", "dout")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_void_p) for name in _RESULTS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("softplus", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def _arguments(u, delta, A, B, C, D, z, bias, softplus, **results: Tensor) -> _Arguments:
    batch, dim, length = u.shape
    a = _Arguments(u=as_map(u, dim), delta=as_map(delta, dim), z=as_map(z, dim))
    for name, x in zip(_POINTERS, (A, D, bias, B, C), strict=True):
        setattr(a, name, pointer(x))
    for name, stride in zip(_STRIDES, (*B.stride(), *C.stride()), strict=True):
        setattr(a, name, stride)
    for name, x in results.items():
        setattr(a, name, pointer(x))
    a.batch, a.dim, a.length, a.state, a.groups = batch, dim, length, A.shape[1], B.shape[1]
    a.softplus, a.threads = softplus, torch.get_num_threads()
    return a


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    inputs = [as_float(x) for x in (u, delta, A.contiguous(), B, C, D, z, delta_bias)]
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    chunks = -(-length // STATE_CHUNK["cpu"])
    out = torch.empty(u.shape, dtype=torch.float32)
    last = torch.empty(batch, dim, n_state)
    states = torch.empty(chunks + 1, batch, groups, n_state, dim // groups)
    a = _arguments(*inputs, delta_softplus, out=out, last=last, states=states)
    library().selective_scan_forward(ctypes.byref(a))
    return out.to(out_dtype), last, states


def backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus) -> tuple[Tensor, ...]:
    """As `reference.backward`."""
    inputs = [as_float(x) for x in (u, delta, A.contiguous(), B, C, D, z, delta_bias)]
    dout = as_float(dout)
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    blocks = -(-dim // groups // 16)
    parts = min(blocks, -(-_MIN_TASKS // max(batch * groups, 1)))
    du, ddelta = torch.empty(u.shape, dtype=torch.float32), torch.empty(u.shape, dtype=torch.float32)
    dz = torch.empty(u.shape if z is not None else 0, dtype=torch.float32)
    dA, dD, dbias = torch.empty(batch, dim, n_state), torch.empty(batch, dim), torch.empty(batch, dim)
    dB, dC = (torch.zeros(parts, batch, groups, n_state, length) for _ in range(2))
    a = _arguments(
        *inputs, delta_softplus, states=states, du=du, ddelta=ddelta, dz=dz, dA=dA, dD=dD, dbias=dbias, dB=dB, dC=dC
    )
    a.dout, a.parts = as_map(dout, dim), parts
    library().selective_scan_backward(ctypes.byref(a))
    if delta.shape[1] != dim:
        ddelta = ddelta.unflatten(1, (delta.shape[1], -1)).sum(2)
    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        dA.sum(0),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        dD.sum(0) if D is not None else u.new_empty(0),
        dz.to(u.dtype),
        dbias.sum(0).unflatten(0, (delta.shape[1], -1)).sum(1) if delta_bias is not None else u.new_empty(0),
    )
