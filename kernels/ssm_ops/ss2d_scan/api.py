"""The whole scan of SS2D in one operator: routes, low-rank step sizes, four selective scans and their sum.

Liu et al. 2024, "VMamba", section 4.2 (https://arxiv.org/abs/2401.10166). A route only permutes pixels, so what is
linear in a pixel (the projection to step sizes, B and C) is the same before and after it: `proj` is made once per
image, and a fused implementation never writes a route to memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import resolve
from ..cross_scan import SCANS
from ..selective_scan.api import MAX_STATE
from ..selective_scan.ops import state_dtype
from . import ops
from .impl import reference

MAX_RANK = 256


def ss2d_scan(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    scans: str = "cross2d",
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """With proj split into (dt_k, B_k, C_k) for every route k, sum over k of route_k^-1 of

        selective_scan(route_k(x), dt_weight_k route_k(dt_k), A_k, route_k(B_k), route_k(C_k), D_k, dt_bias_k, softplus)

    Shapes: B batch, D channels, H W map, K = 4 routes, N state, R rank of the step sizes.

    Args:
        x: (B, D, H, W), float32, float16, bfloat16 or float64; any strides (channels-last is the fastest).
        proj: (B, H, W, K * (R + 2N)): per pixel and route R numbers for the step size, N of B, N of C. Dtype of x.
        dt_weight: (K, D, R), as A (K*D, N), D (K*D,) and dt_bias (K*D,) in float32 (float64 where x is).
        scans: "cross2d", "unidi" or "bidi", see `cross_scan`.
        out_dtype: of the result; None is that of x.
        impl: "auto", "reference", "cpu" or "triton". "reference" is the composition of `cross_scan`, `selective_scan`
            and `cross_merge`, which "auto" also takes where no fused implementation is available.

    Returns:
        (B, D, H, W), channels-last in memory where x is, else contiguous.

    States, exponentials and sums are kept in float32 (float64). Gradients come in the dtype of their input. The same
    call gives the same bits. First derivatives only.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    _check(x, proj, dt_weight, A, D, dt_bias, scans)
    chosen = impl if impl == "reference" else resolve(ops.SS2D_SCAN, impl, x.device, x.dtype)
    out_dtype = out_dtype or x.dtype
    if chosen == "reference":
        return reference.composition(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, impl)
    return _Ss2dScan.apply(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, chosen)


class _Ss2dScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, impl):
        out, states = ops.ss2d_scan_fwd(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, impl)
        ctx.save_for_backward(x, proj, dt_weight, A, D, dt_bias, states)
        ctx.scans, ctx.impl = scans, impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        grads = ops.ss2d_scan_bwd(dout, *ctx.saved_tensors, ctx.scans, ctx.impl)
        return *grads, None, None, None


def _check(x, proj, dt_weight, A, D, dt_bias, scans) -> None:
    if scans not in SCANS:
        raise ValueError(f"ss2d_scan: scans={scans!r} is not one of {', '.join(SCANS)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"ss2d_scan: x is {x.dtype}; use float32, float16, bfloat16 or float64")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"ss2d_scan: x must be (B, D, H, W) with at least one pixel, got {tuple(x.shape)}")
    if A.dim() != 2 or not 1 <= A.shape[1] <= MAX_STATE:
        raise ValueError(f"ss2d_scan: A must be (4 * D, N) with N from 1 to {MAX_STATE}, got {tuple(A.shape)}")
    if dt_weight.dim() != 3 or not 1 <= dt_weight.shape[2] <= MAX_RANK:
        raise ValueError(f"ss2d_scan: dt_weight must be (4, D, R), 1 <= R <= {MAX_RANK}, got {tuple(dt_weight.shape)}")
    (batch, dim, height, width), n_state, rank = x.shape, A.shape[1], dt_weight.shape[2]
    maps = {"proj": (proj, (batch, height, width, 4 * (rank + 2 * n_state)))}
    parameters = {
        "dt_weight": (dt_weight, (4, dim, rank)),
        "A": (A, (4 * dim, n_state)),
        "D": (D, (4 * dim,)),
        "dt_bias": (dt_bias, (4 * dim,)),
    }
    for expected, tensors in ((x.dtype, maps), (state_dtype(x.dtype), parameters)):
        for name, (given, shape) in tensors.items():
            if given.shape != shape:
                raise ValueError(
                    f"ss2d_scan: {name} must be {tuple(shape)} for x {tuple(x.shape)}, R {rank}, N {n_state}, "
                    f"got {tuple(given.shape)}"
                )
            if given.dtype != expected:
                raise TypeError(f"ss2d_scan: {name} must be {expected} beside x in {x.dtype}, got {given.dtype}")
            if given.device != x.device:
                raise ValueError(f"ss2d_scan: {name} is on {given.device}, x is on {x.device}")
