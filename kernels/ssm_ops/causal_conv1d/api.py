"""Depthwise causal convolution over time with SiLU, in both directions: the short filter before the scan of Mamba.

Gu & Dao 2023, "Mamba", section 3.4 (https://arxiv.org/abs/2312.00752); both directions: Zhu et al. 2024, "Vision
Mamba", algorithm 1 (https://arxiv.org/abs/2401.09417).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import Differentiable
from .._common import check_beside, check_floating, empty_gradient, state_dtype
from .._library import SINGLE_AND_HALF, declare, register, resolve
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
        (B, D, L), dtype of x; contiguous, but kernels give channels-last results, (B, L, D) in memory, for such x.

    Sums and the activation are formed in float32 (float64 for float64 inputs), whatever autocast says. Gradients come
    in the dtype of their input. The same call gives the same bits.

    Can be differentiated any number of times, also by `torch.func` and in forward mode. The first gradient is computed
    by the chosen implementation, all others by the reference (see `_autograd.py`).

    Raises:
        ValueError, TypeError: a shape, dtype or activation that does not fit, named.
        RuntimeError: `impl` cannot run on this device.
    """
    _check(x, weight, bias, activation)
    args = (x, weight, bias, activation == "silu", reverse)
    if impl == "reference":
        return _CONV.meaning(*args, impl)
    return _CONV.forward(*args, resolve(CAUSAL_CONV1D, impl, x.device, x.dtype))


def _check(x, weight, bias, activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation={activation!r} is not one of None, 'silu'")
    check_floating("causal_conv1d", "x", x)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"causal_conv1d: x must be (B, D, L) with L > 0, got {tuple(x.shape)}")
    dim = x.shape[1]
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"causal_conv1d: weight must be ({dim}, K) with K > 0, got {tuple(weight.shape)}")
    dtypes = (x.dtype, state_dtype(x.dtype))
    others = {"weight": (weight, [(dim, weight.shape[1])], dtypes), "bias": (bias, [(dim,)], dtypes)}
    check_beside("causal_conv1d", "x", x, others)


# ---- registration ---------------------------------------------------------------------------------------------------

# Nothing is saved but the inputs: the backward forms the sum before the activation again.

CAUSAL_CONV1D = declare("causal_conv1d", __package__, SINGLE_AND_HALF, cpu=("cpu",), triton=("cuda",), reference=None)


def is_channels_last(x: torch.Tensor) -> bool:
    """Do the channels of a token of (B, D, L) lie side by side?"""
    return x.stride(1) == 1


def result_like(x: torch.Tensor, impl: str, dtype: torch.dtype) -> torch.Tensor:
    """(B, D, L), not filled: kernels keep the layout of channels-last inputs, the reference has contiguous results."""
    if impl != "reference" and is_channels_last(x):
        return x.new_empty(x.transpose(-2, -1).shape, dtype=dtype).transpose(-2, -1)
    return x.new_empty(x.shape, dtype=dtype)


def _fake_fwd(x, weight, bias, silu, reverse, impl):
    return result_like(x, impl, x.dtype)


def _fake_bwd(dout, x, weight, bias, silu, reverse, impl):
    return result_like(x, impl, x.dtype), empty_gradient(weight, x), empty_gradient(bias, x)


causal_conv1d_fwd = register(
    CAUSAL_CONV1D,
    "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str impl) -> Tensor out",
    _fake_fwd,
    "forward",
)

causal_conv1d_bwd = register(
    CAUSAL_CONV1D,
    "causal_conv1d_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str impl) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fake_bwd,
    "backward",
)

_CONV = Differentiable(causal_conv1d_fwd, causal_conv1d_bwd, reference.forward)
