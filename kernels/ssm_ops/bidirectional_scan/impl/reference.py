"""The bidirectional scan as a composition: one selective scan of twice the channels, half of them reversed in time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._common import state_dtype
from ..._library import no_autocast
from ...selective_scan import selective_scan


def composition(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, impl) -> Tensor:
    """(B, L, D); `impl` is handed on to `selective_scan`. Differentiable by it."""
    rank, n_state = dt_weight.shape[2], A.shape[1]
    u = torch.cat([x_forward.transpose(-2, -1), x_backward.transpose(-2, -1).flip(2)], 1)  # (B, S*D, L)
    there, back = proj.transpose(-2, -1).chunk(2, dim=1)
    dt, B, C = torch.stack([there, back.flip(2)], 1).split([rank, n_state, n_state], dim=2)  # (B, S, *, L)
    with no_autocast(u.device.type):
        delta = dt_weight @ dt.to(dt_weight.dtype)  # (B, S, D, L), a sum: it stays in float32
    y = selective_scan(
        u,
        delta.flatten(1, 2),
        A,
        B,
        C,
        D,
        dt_bias,
        delta_softplus=True,
        out_dtype=state_dtype(u.dtype),
        impl=impl,
    )
    there, back = y.chunk(2, dim=1)
    return (there + back.flip(2)).transpose(-2, -1).to(out_dtype).contiguous()


def forward(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, _keep_states) -> tuple[Tensor, Tensor]:
    """(out, states) in plain PyTorch, for derivatives; it has no states."""
    out = composition(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, "reference")
    return out, x_forward.new_empty(0)
