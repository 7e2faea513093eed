"""Norms and projections for both memory layouts: NHWC ("channel-last") and NCHW ("channel-first").

A model is channel-first exactly if its norm is "ln2d" or "bn". Parameters have the same names and shapes in both
layouts, so checkpoints move freely between them.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d, is_exportable
from torch import Tensor
from torchvision.ops import Permute

_NORMS = {
    "ln": partial(nn.LayerNorm, eps=1e-5),
    "ln2d": partial(LayerNorm2d, eps=1e-5),
    "bn": nn.BatchNorm2d,
}


def get_norm(name: str):
    """Constructor `norm(channels)` for "ln" (NHWC), "ln2d" or "bn" (both NCHW)."""
    if name.lower() not in _NORMS:
        raise ValueError(f"norm_layer={name!r} is not one of {', '.join(_NORMS)}")
    return _NORMS[name.lower()]


def is_channel_first(norm_layer: str) -> bool:
    return norm_layer.lower() in ("ln2d", "bn")


class Linear2d(nn.Linear):
    """A linear map of the channels of (B, C, H, W), with the 2-D weight (out, in) of `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Linear(nn.Linear):
    """`nn.Linear` for tokens (..., C).

    In float32 on the CPU it is computed as a 1x1 convolution of a channels-last map of height 1. That is the same
    product, but by oneDNN, whose kernels use the whole vector unit of every processor; the BLAS of most builds of
    PyTorch (MKL) does so on Intel's only, and elsewhere takes up to twice the time. oneDNN is fast where channels fill
    blocks of 16; other sizes are left to the BLAS.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.convolves = in_features % 16 == 0 == out_features % 16 and not is_exportable()

    def forward(self, x: Tensor) -> Tensor:
        if not self.convolves or x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() < 3:
            return super().forward(x)
        image = x.flatten(1, -2).transpose(1, 2).unsqueeze(2)  # (B, C, 1, tokens)
        y = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return y.squeeze(2).transpose(1, 2).unflatten(1, x.shape[1:-1])


def get_linear(channel_first: bool) -> type[nn.Linear]:
    return Linear2d if channel_first else Linear


def to_channel_last() -> Permute:
    """(B, C, H, W) -> (B, H, W, C)"""
    return Permute([0, 2, 3, 1])


def to_channel_first() -> Permute:
    """(B, H, W, C) -> (B, C, H, W)"""
    return Permute([0, 3, 1, 2])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension: Zhang & Sennrich 2019, computed in float32 (float64) at least.

    The result has the dtype of the weight, whatever the precision of the residual stream it reads.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.weight.shape, eps=self.eps)
        return x.to(self.weight.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
