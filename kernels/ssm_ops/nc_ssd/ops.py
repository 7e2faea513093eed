"""The registered operators ``ssm_ops::nc_ssd_fwd`` and ``_bwd``: schemas and fakes. Mathematics: api.py.

Shapes: B batch, L length, H heads, P channels of a head, N state, G groups (divides H).

`state` is what the backward needs besides the inputs: the sum over all tokens, (B, H, P, N), in fp32 (fp64 for fp64).
Absent optional gradients are returned as tensors without elements, because an operator's arity is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import SINGLE_AND_HALF, declare, register
from ..selective_scan.ops import state_dtype

NC_SSD = declare("nc_ssd", __package__, SINGLE_AND_HALF, reference=None)


def _fake_fwd(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, out_dtype, impl):
    batch, _, heads, head_dim = x.shape
    state = x.new_empty((batch, heads, head_dim, B.shape[3]), dtype=state_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), state


def _fake_bwd(dout, x, dt, A, B, C, D, dt_bias, state, dt_softplus, positive, impl):
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    return tuple(like(t) for t in (x, dt, A, B, C, D, dt_bias))


nc_ssd_fwd = register(
    NC_SSD,
    "nc_ssd_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "
    "bool positive, ScalarType out_dtype, str impl) -> (Tensor out, Tensor state)",
    _fake_fwd,
    "forward",
)

nc_ssd_bwd = register(
    NC_SSD,
    "nc_ssd_bwd(Tensor dout, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor state, bool dt_softplus, bool positive, str impl) "
    "-> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor ddt_bias)",
    _fake_bwd,
    "backward",
)
