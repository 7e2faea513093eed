"""The whole scan of SS2D in one operator: routes, low-rank step sizes, four selective scans and their sum.

Liu et al. 2024, "VMamba", section 4.2 (https://arxiv.org/abs/2401.10166). A route only permutes pixels, so what is
linear in a pixel (the projection to step sizes, B and C) is the same before and after it: `proj` is made once per
image, and a fused implementation never writes a route to memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _image_scan
from .._autograd import Differentiable
from .._common import MAX_RANK, SCANS, TRITON_CHUNK, check_beside, check_floating, empty_gradient, state_dtype
from .._interface import MAX_STATE
from .._library import SINGLE_AND_HALF, declare, register, resolve
from .impl import reference


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
    call gives the same bits.

    Can be differentiated any number of times, also by `torch.func` and in forward mode. The first gradient is computed
    by the chosen implementation, all others by the reference (see `_autograd.py`).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    _check(x, proj, dt_weight, A, D, dt_bias, scans)
    chosen = impl if impl == "reference" else resolve(SS2D_SCAN, impl, x.device, x.dtype)
    out_dtype = out_dtype or x.dtype
    if chosen == "reference":
        return reference.composition(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, impl)
    return _SCAN.forward(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, False, chosen)[0]


def _check(x, proj, dt_weight, A, D, dt_bias, scans) -> None:
    if scans not in SCANS:
        raise ValueError(f"ss2d_scan: scans={scans!r} is not one of {', '.join(SCANS)}")
    check_floating("ss2d_scan", "x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"ss2d_scan: x must be (B, D, H, W) with at least one pixel, got {tuple(x.shape)}")
    if A.dim() != 2 or not 1 <= A.shape[1] <= MAX_STATE:
        raise ValueError(f"ss2d_scan: A must be (4 * D, N) with N from 1 to {MAX_STATE}, got {tuple(A.shape)}")
    if dt_weight.dim() != 3 or not 1 <= dt_weight.shape[2] <= MAX_RANK:
        raise ValueError(f"ss2d_scan: dt_weight must be (4, D, R), 1 <= R <= {MAX_RANK}, got {tuple(dt_weight.shape)}")
    (batch, dim, height, width), n_state, rank = x.shape, A.shape[1], dt_weight.shape[2]
    own, wide = (x.dtype,), (state_dtype(x.dtype),)
    others = {
        "proj": (proj, [(batch, height, width, 4 * (rank + 2 * n_state))], own),
        "dt_weight": (dt_weight, [(4, dim, rank)], wide),
        "A": (A, [(4 * dim, n_state)], wide),
        "D": (D, [(4 * dim,)], wide),
        "dt_bias": (dt_bias, [(4 * dim,)], wide),
    }
    check_beside("ss2d_scan", "x", x, others, f", R {rank}, N {n_state}")


# ---- registration ---------------------------------------------------------------------------------------------------

# `states` is what the backward needs besides the inputs: the float32 state before every chunk of `STATE_CHUNK[impl]`
# pixels of a route, (S + 1, B, K, N, D) with S = ceil(H*W / chunk); the last entry is not read. Without `keep_states`,
# where no backward follows, it has no elements.
# Out and dx have the strides of x if it is dense. "reference" is a composition of other operators, without these two.

SS2D_SCAN = declare("ss2d_scan", __package__, SINGLE_AND_HALF, cpu=("cpu",), triton=("cuda",), reference=None)

STATE_CHUNK = {"cpu": _image_scan.STATE_CHUNK, "triton": TRITON_CHUNK}
"""Pixels of a route between two saved states, by implementation."""


def _fake_fwd(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, keep_states, impl):
    batch, dim, height, width = x.shape
    n_chunks = (height * width + STATE_CHUNK[impl] - 1) // STATE_CHUNK[impl]
    shape = (n_chunks + 1, batch, 4, A.shape[1], dim) if keep_states else (0,)
    return torch.empty_like(x, dtype=out_dtype), x.new_empty(shape, dtype=torch.float32)


def _fake_bwd(dout, x, proj, dt_weight, A, D, dt_bias, states, scans, impl):
    return torch.empty_like(x), *(empty_gradient(t, x) for t in (proj, dt_weight, A, D, dt_bias))


ss2d_scan_fwd = register(
    SS2D_SCAN,
    "ss2d_scan_fwd(Tensor x, Tensor proj, Tensor dt_weight, Tensor A, Tensor D, Tensor dt_bias, str scans, "
    "ScalarType out_dtype, bool keep_states, str impl) -> (Tensor out, Tensor states)",
    _fake_fwd,
    "forward",
)

ss2d_scan_bwd = register(
    SS2D_SCAN,
    "ss2d_scan_bwd(Tensor dout, Tensor x, Tensor proj, Tensor dt_weight, Tensor A, Tensor D, Tensor dt_bias, "
    "Tensor states, str scans, str impl) "
    "-> (Tensor dx, Tensor dproj, Tensor ddt_weight, Tensor dA, Tensor dD, Tensor ddt_bias)",
    _fake_bwd,
    "backward",
)

_SCAN = Differentiable(ss2d_scan_fwd, ss2d_scan_bwd, reference.forward)
