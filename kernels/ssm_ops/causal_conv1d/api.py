"""Depthwise causal convolution over time with SiLU, in both directions: the short filter before the scan of Mamba.

Gu & Dao 2023, "Mamba", section 3.4 (https://arxiv.org/abs/2312.00752); both directions: Zhu et al. 2024, "Vision
Mamba", algorithm 1 (https://arxiv.org/abs/2401.09417).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import no_autocast, resolve
from ..selective_scan.ops import state_dtype
from . import ops
from .impl import reference

ACTIVATIONS = (None, "silu")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    reverse: bool = False,
    impl: str = "auto",
) -> Tensor:
    """For every sample and channel, with x_t = 0 outside of 0..L-1, over t = 0..L-1:

        y_t = activation(bias + sum_k weight_k x_{t-(K-1)+k})       k = 0..K-1; the last tap is on the token itself
        y_t = activation(bias + sum_k weight_k x_{t+(K-1)-k})       with `reverse`

    `reverse` reads time backwards: it equals flipping x, convolving and flipping back, without the flips.

    Shapes: B batch, D channels, L length, K taps.

    Args:
        x: (B, D, L), float32, float16, bfloat16 or float64; any strides.
        weight: (D, K), as bias in the dtype of x or in float32 (float64 where x is).
        bias: (D,).
        activation: None or "silu".
        impl: "auto", "cpu" or "triton" (CUDA), both not in float64, or "reference", which is plain PyTorch without a
            custom operator, also under ``torch.export``.

    Returns:
        (B, D, L), dtype of x; contiguous, but "cpu" gives channels-last results, (B, L, D) in memory, for such x.

    Sums and the activation are formed in float32 (float64 for float64 inputs), whatever autocast says. Gradients come
    in the dtype of their input. The same call gives the same bits. First derivatives only.

    Raises:
        ValueError, TypeError: a shape, dtype or activation that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    _check(x, weight, bias, activation)
    chosen = None if impl == "reference" else resolve(ops.CAUSAL_CONV1D, impl, x.device, x.dtype)
    return _CausalConv1d.apply(x, weight, bias, activation == "silu", reverse, chosen)


class _CausalConv1d(torch.autograd.Function):
    """Autograd around the registered operators (`impl` names one) or around plain PyTorch (`impl` is None)."""

    @staticmethod
    def forward(ctx, x, weight, bias, silu, reverse, impl):
        ctx.save_for_backward(x, weight, bias)
        ctx.flags, ctx.impl = (silu, reverse), impl
        if impl is None:
            with no_autocast(x.device.type):
                return reference.forward(x, weight, bias, silu, reverse)
        return ops.causal_conv1d_fwd(x, weight, bias, silu, reverse, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        inputs = ctx.saved_tensors
        args = (dout, *inputs, *ctx.flags)
        if ctx.impl is None:
            with no_autocast(dout.device.type):
                grads = reference.backward(*args)
        else:
            grads = ops.causal_conv1d_bwd(*args, ctx.impl)
        grads = (None if t is None else g for t, g in zip(inputs, grads, strict=True))
        return *grads, None, None, None


def _check(x, weight, bias, activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation={activation!r} is not one of None, 'silu'")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"causal_conv1d: x is {x.dtype}; use float32, float16, bfloat16 or float64")
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"causal_conv1d: x must be (B, D, L) with L > 0, got {tuple(x.shape)}")
    dim = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != dim or weight.shape[1] == 0:
        raise ValueError(
            f"causal_conv1d: weight must be ({dim}, K) with K > 0 for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"causal_conv1d: bias must be ({dim},) for x {tuple(x.shape)}, got {tuple(bias.shape)}")
    legal = dict.fromkeys((x.dtype, state_dtype(x.dtype)))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dtype not in legal:
            raise TypeError(
                f"causal_conv1d: {name} must be {' or '.join(map(str, legal))} beside x in {x.dtype}, got {t.dtype}"
            )
        if t.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {t.device}, x is on {x.device}")
