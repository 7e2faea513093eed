"""The 3x3 depthwise convolution of VSSD on a channels-last map, with the SiLU behind it: of the mixer (Dao & Gu 2024,
Mamba-2, in two dimensions), and without SiLU as a position encoding (Chu et al. 2023, https://arxiv.org/abs/2102.10882).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import FLOATING, check_beside, check_floating
from .._library import SINGLE_AND_HALF, declare, resolve, runs_eagerly
from .impl import reference


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Per channel, with zeros around the map,

        y[h, w] = act(bias + sum_{i, j = 0..2} weight[i, j] x[h + i - 1, w + j - 1])

    Shapes: B batch, H W map, C channels.

    Args:
        x: (B, H, W, C), float32, float16, bfloat16 or float64; any strides, of which that of C is 1 best.
        weight: (C, 1, 3, 3), bias: (C,) or None; of any of these dtypes.
        activation: None or "silu".
        out_dtype: of the result; None is that of x.
        impl: "auto", "cpu" (not in float64), or "reference", which is plain PyTorch. "cpu" is for inference: where a
            derivative is wanted, or the call is compiled, exported or transformed, "auto" takes the reference.

    Returns:
        (B, H, W, C), contiguous.

    Products are summed in float32 (float64). The same call gives the same bits.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, named.
        RuntimeError: `impl` cannot run on this device, or not with derivatives.
    """
    _check(x, weight, bias, activation)
    args = (x, weight, bias, activation == "silu", out_dtype or x.dtype)
    eager = runs_eagerly(x, weight, bias)
    if impl == "reference" or (impl == "auto" and (not eager or x.device.type != "cpu" or x.dtype == torch.float64)):
        return reference.forward(*args)
    chosen = resolve(DEPTHWISE_CONV, impl, x.device, x.dtype)
    if chosen == "reference":
        return reference.forward(*args)
    if not eager:
        raise RuntimeError(f"depthwise_conv: impl={impl!r} has no derivatives and cannot be traced; take impl='auto'")
    return DEPTHWISE_CONV.find(chosen).load().forward(*args)


def _check(x, weight, bias, activation) -> None:
    check_floating("depthwise_conv", "x", x)
    if activation not in (None, "silu"):
        raise ValueError(f"depthwise_conv: activation={activation!r} is neither None nor 'silu'")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"depthwise_conv: x must be (B, H, W, C) with at least one pixel, got {tuple(x.shape)}")
    channels = x.shape[3]
    others = {"weight": (weight, [(channels, 1, 3, 3)], FLOATING), "bias": (bias, [(channels,)], FLOATING)}
    check_beside("depthwise_conv", "x", x, others)


DEPTHWISE_CONV = declare("depthwise_conv", __package__, SINGLE_AND_HALF, cpu=("cpu",), reference=None)
