"""Linear maps of channels for both memory layouts, NHWC ("channel-last") and NCHW ("channel-first"), and what follows
them in the same pass.

Parameters have the names and shapes of `nn.Linear` in both layouts, so checkpoints move freely between them.

Shapes: B batch, H W map, C channels in, O channels out.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor

from . import onednn
from .onednn import is_wrapper


class Linear(nn.Linear):
    """`nn.Linear` for tokens (..., C).

    In float32 on the CPU the product is oneDNN's, whose kernels use the whole vector unit of every processor; the BLAS
    of most builds of PyTorch (MKL) does so on Intel's only, and elsewhere takes up to twice the time. Where derivatives
    are wanted, it is written as a 1x1 convolution of a channels-last map of height 1. oneDNN is fast there if channels
    fill blocks of 16; other sizes are left to the BLAS.
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
        if self.runs_onednn(x):
            return self.tokens(x)
        if not self.convolves or x.device.type != "cpu" or x.dim() < 3 or x.dtype != torch.float32:
            return super().forward(x)
        if is_wrapper(self.weight):
            return super().forward(x)
        image = x.flatten(1, -2).transpose(1, 2).unsqueeze(2)  # (B, C, 1, tokens)
        y = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return y.squeeze(2).transpose(1, 2).unflatten(1, x.shape[1:-1])

    def runs_onednn(self, x: Tensor) -> bool:
        """Whether `tokens` can stand for this layer."""
        return onednn.takes(x, self.weight, self.bias)

    def tokens(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        """act of the map of (..., C), by oneDNN; without derivatives."""
        return onednn.linear(x, self.weight, self.bias, act)

    def for_inference(self, dtype: torch.dtype) -> nn.Module:
        """The same map, in float32 or bfloat16, for inference on the CPU; a quantised one stays."""
        return self if is_wrapper(self.weight) else PackedLinear(self, dtype)


class Linear2d(Linear):
    """A `Linear` in a network that computes in NCHW: of tokens (B, H, W, C) in the memory of (B, C, H, W), which the
    result keeps.

    The channels are the last dimension here, too, so that what is put around or in the place of an `nn.Linear`, such as
    an adapter, is right; `of_channels` calls it for a map.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous() and self.runs_onednn(x):
            return self.tokens(x)
        if x.dim() != 4 or is_wrapper(self.weight):
            return F.linear(x, self.weight, self.bias)
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)


def of_channels(layer: nn.Module, x: Tensor, channel_first: bool) -> Tensor:
    """`layer`, which maps (..., C), of the channels of (B, H, W, C), or of (B, C, H, W) with `channel_first`."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if channel_first else layer(x)


class PackedLinear(nn.Module):
    """A `Linear` or `Linear2d` whose weight lies in oneDNN's order, for inference on the CPU alone."""

    def __init__(self, linear: Linear, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = dtype
        self.packed = onednn.pack_linear(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x)

    def runs_onednn(self, x: Tensor) -> bool:
        return True

    def tokens(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        """act of the map of (..., C)."""
        onednn.refuse_derivatives(x)
        return onednn.linear(x, self.packed, self.bias, act)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}"


def get_linear(channel_first: bool) -> type[Linear]:
    return Linear2d if channel_first else Linear


HIDDEN_BYTES = 4 << 20
"""Of the activations between two maps that are alive at once: what stays in the cache of any processor."""


def two_maps(first: nn.Module, act: nn.Module, second: nn.Module, x: Tensor) -> Tensor | None:
    """second(act(first(x))) of (..., C) where no derivative is wanted, a part of the tokens at a time, so that the wide
    activations between the two never leave the cache; None where it cannot be done so, or somebody watches what is
    between."""
    known = type(first) in (Linear, Linear2d, PackedLinear) and type(first) is type(second) and onednn.known_act(act)
    if not known or not (first.runs_onednn(x) and second.runs_onednn(x)) or not onednn.unwatched(first, act, second):
        return None
    if type(first) is Linear2d and not x.is_contiguous():
        return None
    tokens = x.reshape(-1, x.shape[-1])
    rows = max(HIDDEN_BYTES // (first.out_features * onednn.dtype_of_product(x).itemsize), 1)
    if len(tokens) <= 2 * rows:
        y = second.tokens(first.tokens(tokens, act))
    else:
        y = tokens.new_empty((len(tokens), second.out_features), dtype=onednn.dtype_of_product(x))
        for start in range(0, len(tokens), rows):
            y[start : start + rows] = second.tokens(first.tokens(tokens[start : start + rows], act))
    return y.unflatten(0, x.shape[:-1])
