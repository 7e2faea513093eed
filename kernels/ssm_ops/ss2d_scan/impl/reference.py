"""SS2D's scan as a composition of the other operators: the definition, and what runs where nothing fused does."""

from __future__ import annotations

from torch import Tensor

from ..._common import state_dtype
from ..._library import no_autocast
from ...cross_scan import cross_merge, cross_scan
from ...selective_scan import selective_scan


def composition(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, impl) -> Tensor:
    """(B, D, H, W); `impl` is handed on to the operators. Differentiable by theirs."""
    rank, n_state = dt_weight.shape[2], A.shape[1]
    routes = cross_scan(x, scans=scans, impl=impl)  # (B, K, D, L)
    fields = proj.unflatten(3, (4, -1)).permute(0, 3, 4, 1, 2)  # (B, K, R + 2N, H, W)
    dt, B, C = cross_scan(fields, one_by_one=True, scans=scans, impl=impl).split([rank, n_state, n_state], dim=2)
    with no_autocast(x.device.type):
        delta = dt_weight @ dt.to(dt_weight.dtype)  # (B, K, D, L), a sum: it stays in float32
    y = selective_scan(
        routes.flatten(1, 2),
        delta.flatten(1, 2),
        A,
        B,
        C,
        D,
        dt_bias,
        delta_softplus=True,
        out_dtype=state_dtype(x.dtype),
        impl=impl,
    )
    y = y.unflatten(1, (4, -1)).unflatten(3, x.shape[2:])
    if x.permute(0, 2, 3, 1).is_contiguous() and not x.is_contiguous():  # `vmap` knows no other memory format
        y = cross_merge(y, in_channel_first=False, scans=scans, impl=impl)  # (B, L, D)
        y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    else:
        y = cross_merge(y, scans=scans, impl=impl).unflatten(2, x.shape[2:])
    return y.to(out_dtype)


def forward(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, _keep_states) -> tuple[Tensor, Tensor]:
    """(out, states) in plain PyTorch, for derivatives; it has no states."""
    return composition(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, "reference"), x.new_empty(0)
