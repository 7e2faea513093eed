"""Non-causal state space duality (NC-SSD), the mixer of VSSD: every token sees every token, weighted but not decayed.

Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality", section 3.2
(https://arxiv.org/abs/2407.18559).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import no_autocast, resolve
from ..ssd.api import check
from . import ops
from .impl import reference


def nc_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    positive: bool = True,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """For every sample and head j, with group g = j mod G, over all tokens t = 0..L-1:

        s_t = dt_t + dt_bias                    (softplus of it with dt_softplus; identity above 20)
        w_t = -s_t A                            (s_t A if not `positive`)
        S   = sum_t w_t x_t B_t^T               (P x N numbers, one state for the whole image)
        y_t = S C_t + D x_t

    Shapes: B batch, L length, H heads, P channels of a head, N state, G groups.

    Args:
        x: (B, L, H, P), float32, float16, bfloat16 or float64; any strides.
        dt: (B, L, H), in the dtype of x or in float32 (float64 where x is).
        A: (H,), negative by custom, as D and dt_bias in float32 (float64 where x is).
        B, C: (B, L, G, N). G divides H: groups take turns over the heads, unlike in `ssd_chunk_scan`, where
            neighbouring heads share a group. Dtype of x.
        D: (H,) or (H, P), the skip connection.
        dt_bias: (H,).
        positive: the sign of the weights; True is that of all published VSSD models.
        out_dtype: of the result; None is that of x.
        impl: "auto" or "reference", which is plain PyTorch without a custom operator, also under ``torch.export``.

    Returns:
        (B, L, H, P), contiguous.

    The order of the tokens does not matter. The state is a sum over all tokens, not a mean: it grows with the image.
    It and all sums are kept in float32 (float64 for float64 inputs), whatever autocast says. Gradients come in the
    dtype of their input. The same call gives the same bits. First derivatives only.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    check("nc_ssd", x, dt, A, B, C, D, dt_bias)
    chosen = None if impl == "reference" else resolve(ops.NC_SSD, impl, x.device, x.dtype)
    return _NCSSD.apply(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, out_dtype or x.dtype, chosen)


class _NCSSD(torch.autograd.Function):
    """Autograd around the registered operators (`impl` names one) or around plain PyTorch (`impl` is None)."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, dt_softplus, positive, out_dtype, impl):
        inputs = (x, dt, A, B, C, D, dt_bias)
        args = (*inputs, dt_softplus, positive, out_dtype)
        if impl is None:
            with no_autocast(x.device.type):
                out, state = reference.forward(*args)
        else:
            out, state = ops.nc_ssd_fwd(*args, impl)
        ctx.save_for_backward(*inputs, state)
        ctx.flags, ctx.impl = (dt_softplus, positive), impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *inputs, state = ctx.saved_tensors
        args = (dout, *inputs, state, *ctx.flags)
        if ctx.impl is None:
            with no_autocast(dout.device.type):
                grads = reference.backward(*args)
        else:
            grads = ops.nc_ssd_bwd(*args, ctx.impl)
        grads = (None if t is None else g for t, g in zip(inputs, grads, strict=True))
        return *grads, None, None, None, None
