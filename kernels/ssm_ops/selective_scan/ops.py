"""The registered operators ``ssm_ops::selective_scan_fwd`` and ``_bwd``: schemas and fakes. Mathematics: api.py.

Shapes: B batch, D channels, Dd channels of delta (divides D), L length, N state, G groups (divides D), S saved states.

`states` is what the backward needs besides the inputs: the fp32 (fp64 for fp64) state before every chunk of
`STATE_CHUNK[impl]` tokens and after the last, (S + 1, B, G, N, D/G) with S = ceil(L / chunk). The states in between are
recomputed. (With the last one a compiler need not tell one chunk from several, as size 1 is special to it.)
Absent optional gradients are returned as tensors without elements, because an operator's arity is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._interface import CPU_CHUNK, CUDA_CHUNK
from .._library import SINGLE_AND_HALF, declare, register

SELECTIVE_SCAN = declare(
    "selective_scan",
    __package__,
    SINGLE_AND_HALF,
    cuda=("cuda",),
    cpu=("cpu",),
    triton=("cuda",),
    reference=None,
)

STATE_CHUNK = {"cuda": CUDA_CHUNK, "cpu": CPU_CHUNK, "triton": 128, "reference": 256}
"""Tokens between two saved states, by implementation."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states, exponentials and sums are kept for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype, impl):
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    n_chunks = (length + STATE_CHUNK[impl] - 1) // STATE_CHUNK[impl]
    out = u.new_empty((batch, dim, length), dtype=out_dtype)
    last = u.new_empty((batch, dim, n_state), dtype=state_dtype(u.dtype))
    states = u.new_empty((n_chunks + 1, batch, groups, n_state, dim // groups), dtype=state_dtype(u.dtype))
    return out, last, states


def _fake_bwd(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, impl):
    def like(t: Tensor | None) -> Tensor:
        return u.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    return tuple(like(t) for t in (u, delta, A, B, C, D, z, delta_bias))


selective_scan_fwd = register(
    SELECTIVE_SCAN,
    "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, ScalarType out_dtype, str impl) "
    "-> (Tensor out, Tensor last_state, Tensor states)",
    _fake_fwd,
    "forward",
)

selective_scan_bwd = register(
    SELECTIVE_SCAN,
    "selective_scan_bwd(Tensor dout, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor states, bool delta_softplus, str impl) "
    "-> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias)",
    _fake_bwd,
    "backward",
)
