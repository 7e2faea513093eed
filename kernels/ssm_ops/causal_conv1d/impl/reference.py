"""Causal convolution in plain PyTorch: one product per tap with a shifted view of the padded input.

(``torch.conv1d`` would be one call, but its precision depends on the library behind it, on CUDA even on a TF32 switch.)

Shapes: B batch, D channels, L length, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._common import plus_product, state_dtype


def _shifted(x: Tensor, taps: int, reverse: bool) -> list[Tensor]:
    """What tap k sees: x_{t-(K-1)+k}, or x_{t+(K-1)-k} with `reverse`. (B, D, L) -> K views (B, D, L)"""
    length = x.shape[2]
    padded = F.pad(x.to(state_dtype(x.dtype)), (0, taps - 1) if reverse else (taps - 1, 0))
    return [padded.narrow(2, taps - 1 - k if reverse else k, length) for k in range(taps)]


def _convolve(views: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """bias + sum_k weight_k views_k: (B, D, L)"""
    weight = weight.to(views[0].dtype)
    y = views[0] * weight[:, :1]
    for k in range(1, len(views)):
        y = plus_product(y, views[k], weight[:, k : k + 1])
    return y if bias is None else y + bias[:, None]


def forward(x, weight, bias, silu: bool, reverse: bool) -> Tensor:
    """(B, D, L)"""
    y = _convolve(_shifted(x, weight.shape[1], reverse), weight, bias)
    return (F.silu(y) if silu else y).to(x.dtype)


def backward(dout, x, weight, bias, silu: bool, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias); an absent one as a tensor without elements.

    A token is seen by itself and by the tokens after it: its gradient is the same convolution in the other direction.
    """
    taps = weight.shape[1]
    views = _shifted(x, taps, reverse)
    dy = dout.to(views[0].dtype)
    if silu:
        y = _convolve(views, weight, bias)
        gate = torch.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    dx = _convolve(_shifted(dy, taps, not reverse), weight, None)
    d_weight = torch.stack([(dy * view).sum((0, 2)) for view in views], 1)
    return (
        dx.to(x.dtype),
        d_weight.to(weight.dtype),
        x.new_empty(0) if bias is None else dy.sum((0, 2)).to(bias.dtype),
    )
