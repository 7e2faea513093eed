"""Selective scan by the compiled CPU library (csrc/cpu/selective_scan.cpp). Half precision is converted around it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._interface import BLOCK, Buffer, Map, ScanArguments, StateMap
from ..._native import call
from ..api import STATE_CHUNK

# blocks of channels that may sum dB and dC side by side; fixed, so that results do not depend on the threads
_MIN_TASKS = 16


def _float32(x: Tensor | None) -> Tensor | None:
    """Strides kept: the library computes in float32 only."""
    return x if x is None or x.dtype == torch.float32 else x.float()  # a call that changes nothing takes a microsecond


def _arguments(u, delta, A, B, C, D, z, bias, softplus, **buffers: Tensor) -> ScanArguments:
    u, delta, B, C, z = (_float32(x) for x in (u, delta, B, C, z))
    A, D, bias = (None if x is None else _float32(x).contiguous() for x in (A, D, bias))
    a = ScanArguments(u=Map.of(u, u.shape[1]), delta=Map.of(delta, u.shape[1]), z=Map.of(z, u.shape[1]))
    a.B, a.C = StateMap.of(B), StateMap.of(C)
    for name, x in {"A": A, "D": D, "bias": bias, **buffers}.items():
        setattr(a, name, Buffer.of(x))
    a.batch, a.dim, a.length = u.shape
    a.state, a.groups = A.shape[1], B.shape[1]
    a.softplus, a.threads = softplus, torch.get_num_threads()
    a.kept = u, delta, A, B, C, D, z, bias  # copies live as long as what points to them
    return a


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype, keep_states) -> tuple[Tensor, ...]:
    """As `reference.forward`."""
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    chunks = -(-length // STATE_CHUNK["cpu"])
    out = u.new_empty(u.shape, dtype=torch.float32)
    last = u.new_empty((batch, dim, n_state), dtype=torch.float32)
    states = u.new_empty((chunks + 1, batch, groups, n_state, dim // groups), dtype=torch.float32)
    a = _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out=out, last=last, states=states)
    call("cpu", "selective_scan_forward", a)
    return out.to(out_dtype), last, states if keep_states else u.new_empty(0, dtype=states.dtype)


def backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus) -> tuple[Tensor, ...]:
    """As `reference.backward`."""
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    blocks = -(-dim // groups // BLOCK)
    parts = min(blocks, -(-_MIN_TASKS // max(batch * groups, 1)))
    du, ddelta = (u.new_empty(u.shape, dtype=torch.float32) for _ in range(2))
    dz = u.new_empty(u.shape if z is not None else 0, dtype=torch.float32)
    dA = u.new_empty((batch, dim, n_state), dtype=torch.float32)
    dD, dbias = (u.new_empty((batch, dim), dtype=torch.float32) for _ in range(2))
    dB, dC = (u.new_zeros((parts, batch, groups, n_state, length), dtype=torch.float32) for _ in range(2))
    results = {"du": du, "ddelta": ddelta, "dz": dz, "dA": dA, "dD": dD, "dbias": dbias, "dB": dB, "dC": dC}
    a = _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, states=states.contiguous(), **results)
    dout = _float32(dout)
    a.dout, a.parts = Map.of(dout, dim), parts
    call("cpu", "selective_scan_backward", a)
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
