"""The scans of a bidirectional mixer in one operator: a sequence forwards, another one backwards, and their sum.

Zhu et al. 2024, "Vision Mamba", algorithm 1 (https://arxiv.org/abs/2401.09417), without convolutions and gate. A fused
implementation forms the step sizes from their R numbers, reads the second sequence from its end instead of a reversed
copy, and writes the sum once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import DEFAULT_IMPL, resolve
from ..selective_scan.api import MAX_STATE
from ..selective_scan.ops import state_dtype
from ..ss2d_scan.api import MAX_RANK
from . import ops
from .impl import reference


def bidirectional_scan(
    x_forward: Tensor,
    x_backward: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """With proj split into (dt_s, B_s, C_s) for both directions s, and rev reversing time,

        selective_scan(x_forward, dt_weight_0 dt_0, A_0, B_0, C_0, D_0, dt_bias_0, softplus)
        + rev(selective_scan(rev x_backward, rev(dt_weight_1 dt_1), A_1, rev B_1, rev C_1, D_1, dt_bias_1, softplus))

    Shapes: B batch, L length, D channels, S = 2 directions, N state, R rank of the step sizes.

    Args:
        x_forward, x_backward: (B, L, D), float32, float16, bfloat16 or float64; any strides, contiguous is the fastest.
        proj: (B, L, S * (R + 2N)): per token and direction R numbers for the step size, N of B, N of C, in the order of
            the tokens for both directions. Dtype of x_forward, as x_backward.
        dt_weight: (S, D, R), as A (S*D, N), D (S*D,) and dt_bias (S*D,) in float32 (float64 where x_forward is).
        out_dtype: of the result; None is that of x_forward.
        impl: "cpu" is the fused implementation; "reference", "triton" and "cuda" are compositions of that
            implementation of `selective_scan` with reversed copies. "auto" takes the fused one where it is available,
            else the composition of the fastest scan.

    Returns:
        (B, L, D), contiguous.

    States, exponentials and sums are kept in float32 (float64). Gradients come in the dtype of their input. The same
    call gives the same bits. First derivatives only.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    _check(x_forward, x_backward, proj, dt_weight, A, D, dt_bias)
    out_dtype = out_dtype or x_forward.dtype
    chosen = DEFAULT_IMPL if impl == "auto" else impl
    if chosen in ("auto", "cpu"):
        chosen = resolve(ops.BIDIRECTIONAL_SCAN, impl, x_forward.device, x_forward.dtype)
    if chosen != "cpu":
        return reference.composition(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, impl)
    return _BidirectionalScan.apply(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, chosen)


class _BidirectionalScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, impl):
        inputs = (x_forward, x_backward, proj, dt_weight, A, D, dt_bias)
        out, states = ops.bidirectional_scan_fwd(*inputs, out_dtype, impl)
        ctx.save_for_backward(*inputs, states)
        ctx.impl = impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *ops.bidirectional_scan_bwd(dout, *ctx.saved_tensors, ctx.impl), None, None


def _check(x_forward, x_backward, proj, dt_weight, A, D, dt_bias) -> None:
    name = "bidirectional_scan"
    if x_forward.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{name}: x_forward is {x_forward.dtype}; use float32, float16, bfloat16 or float64")
    if x_forward.dim() != 3 or 0 in x_forward.shape[1:]:
        raise ValueError(f"{name}: x_forward must be (B, L, D) with at least one token, got {tuple(x_forward.shape)}")
    if A.dim() != 2 or not 1 <= A.shape[1] <= MAX_STATE:
        raise ValueError(f"{name}: A must be (2 * D, N) with N from 1 to {MAX_STATE}, got {tuple(A.shape)}")
    if dt_weight.dim() != 3 or not 1 <= dt_weight.shape[2] <= MAX_RANK:
        raise ValueError(f"{name}: dt_weight must be (2, D, R), 1 <= R <= {MAX_RANK}, got {tuple(dt_weight.shape)}")
    (batch, length, dim), n_state, rank = x_forward.shape, A.shape[1], dt_weight.shape[2]
    sequences = {
        "x_backward": (x_backward, (batch, length, dim)),
        "proj": (proj, (batch, length, 2 * (rank + 2 * n_state))),
    }
    parameters = {
        "dt_weight": (dt_weight, (2, dim, rank)),
        "A": (A, (2 * dim, n_state)),
        "D": (D, (2 * dim,)),
        "dt_bias": (dt_bias, (2 * dim,)),
    }
    for expected, tensors in ((x_forward.dtype, sequences), (state_dtype(x_forward.dtype), parameters)):
        for what, (given, shape) in tensors.items():
            if given.shape != shape:
                raise ValueError(
                    f"{name}: {what} must be {tuple(shape)} for x_forward {tuple(x_forward.shape)}, R {rank}, "
                    f"N {n_state}, got {tuple(given.shape)}"
                )
            if given.dtype != expected:
                raise TypeError(
                    f"{name}: {what} must be {expected} beside x_forward in {x_forward.dtype}, got {given.dtype}"
                )
            if given.device != x_forward.device:
                raise ValueError(f"{name}: {what} is on {given.device}, x_forward is on {x_forward.device}")
