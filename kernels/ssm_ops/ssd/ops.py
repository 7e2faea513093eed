"""The registered operators ``ssm_ops::ssd_chunk_scan_fwd`` and ``_bwd``: schemas and fakes. Mathematics: api.py.

Shapes: B batch, L length, H heads, P channels of a head, N state, G groups (divides H), S chunks.

`states` is what the backward needs besides the inputs: the fp32 (fp64 for fp64) state before every chunk of
`chunk_size` tokens and after the last, (S + 1, B, H, P, N) with S = ceil(L / chunk_size).
Absent optional gradients are returned as tensors without elements, because an operator's arity is fixed; the gradient
of the initial states is always there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import SINGLE_AND_HALF, declare, register
from ..selective_scan.ops import state_dtype

SSD_CHUNK_SCAN = declare("ssd_chunk_scan", __package__, SINGLE_AND_HALF, triton=("cuda",), reference=None)


def _fake_fwd(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, chunk_size, out_dtype, impl):
    (batch, length, heads, head_dim), n_state = x.shape, B.shape[3]
    n_chunks = (length + chunk_size - 1) // chunk_size
    out = x.new_empty(x.shape, dtype=out_dtype)
    final = x.new_empty((batch, heads, head_dim, n_state), dtype=state_dtype(x.dtype))
    return out, final, final.new_empty((n_chunks + 1, *final.shape))


def _fake_bwd(dout, dfinal_states, x, dt, A, B, C, D, dt_bias, states, dt_softplus, chunk_size, impl):
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    return *(like(t) for t in (x, dt, A, B, C, D, dt_bias)), like(dfinal_states)


ssd_chunk_scan_fwd = register(
    SSD_CHUNK_SCAN,
    "ssd_chunk_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor? initial_states, bool dt_softplus, SymInt chunk_size, ScalarType out_dtype, str impl) "
    "-> (Tensor out, Tensor final_states, Tensor states)",
    _fake_fwd,
    "forward",
)

ssd_chunk_scan_bwd = register(
    SSD_CHUNK_SCAN,
    "ssd_chunk_scan_bwd(Tensor dout, Tensor dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? dt_bias, Tensor states, bool dt_softplus, SymInt chunk_size, str impl) "
    "-> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor ddt_bias, "
    "Tensor dinitial_states)",
    _fake_bwd,
    "backward",
)
