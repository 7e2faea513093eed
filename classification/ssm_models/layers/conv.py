"""Convolutions of VSSD: depthwise ones on NHWC maps, and conv -> BatchNorm -> ReLU, fusable for inference."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .conv2d import Conv2d, PackedConv2d, activated
from .onednn import is_plain, unwatched


class DepthwiseConv(Conv2d):
    """3x3 depthwise convolution with bias, (B, H, W, C) -> the same.

    The NCHW view of a contiguous NHWC map is what PyTorch calls channels_last: nothing is copied on the way in or out.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def for_inference(self, dtype: torch.dtype) -> nn.Module:
        """The same convolution, in float32 or bfloat16, for inference on the CPU."""
        return PackedDepthwiseConv(self, dtype)


class PackedDepthwiseConv(PackedConv2d):
    """A `DepthwiseConv` for inference on the CPU alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def depthwise_activated(conv: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(conv(x)), (B, H, W, C) -> the same; in one pass where oneDNN can and nobody watches what is between."""
    y = None
    if type(conv) in (DepthwiseConv, PackedDepthwiseConv) and unwatched(conv):
        y = conv.fused(x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), act)
    return act(conv(x)) if y is None else y.permute(0, 2, 3, 1)


class ConvNormAct(nn.Module):
    """conv -> BatchNorm -> ReLU on (B, C, H, W); either of the last two may be absent.

    `timm.utils.reparameterize_model` calls `fuse`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = Conv2d(dim, out_dim, kernel_size, stride, padding, groups=groups, bias=bias, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()  # not in place, which backward hooks do not bear

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, nn.Identity) and unwatched(self.norm):
            return activated(self.conv, self.act, x)
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> nn.Module:
        """The same function with the running statistics folded into the convolution; for a module in eval mode. Itself
        where there is no norm, or the convolution is more than its weight."""
        if isinstance(self.norm, nn.Identity) or not is_plain(self.conv, Conv2d) or not unwatched(self, self.norm):
            return self
        return ConvAct(fuse_conv_bn_eval(self.conv, self.norm), self.act)


class ConvAct(nn.Module):
    """A `ConvNormAct` without its norm."""

    def __init__(self, conv: nn.Module, act: nn.Module):
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.conv, self.act, x)
