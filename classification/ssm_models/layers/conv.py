"""Convolutions of VSSD: depthwise ones on NHWC maps, and conv -> BatchNorm -> ReLU, fusable for inference."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ssm_ops import depthwise_conv, runs_eagerly

from .conv2d import Conv2d, activated
from .onednn import dtype_of_product, is_plain, is_wrapper, refuse_derivatives, unwatched


class DepthwiseConv(Conv2d):
    """3x3 depthwise convolution with bias, (B, H, W, C) -> the same.

    The NCHW view of a contiguous NHWC map is what PyTorch calls channels_last: nothing is copied on the way in or out.
    Eager inference on the CPU takes `ssm_ops.depthwise_conv`, which also reads a part of a wider map where it lies.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.takes(x):
            return self.rows(x)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def takes(self, x: Tensor) -> bool:
        """Whether `rows` can stand for this layer."""
        return x.device.type == "cpu" and runs_eagerly(x, self.weight, self.bias) and not is_wrapper(self.weight)

    def rows(self, x: Tensor, activation: str | None = None) -> Tensor:
        """The activated convolution of (B, H, W, C), without derivatives, in the dtype of products."""
        return depthwise_conv(x, self.weight, self.bias, activation=activation, out_dtype=dtype_of_product(x))

    def for_inference(self, dtype: torch.dtype) -> nn.Module:
        """The same convolution, with results in float32 or bfloat16, for inference on the CPU."""
        return self if is_wrapper(self.weight) else PackedDepthwiseConv(self, dtype)


class PackedDepthwiseConv(nn.Module):
    """A `DepthwiseConv` for inference on the CPU alone."""

    def __init__(self, conv: DepthwiseConv, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias, self.dtype = conv.weight.detach(), conv.bias.detach(), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x)

    def takes(self, x: Tensor) -> bool:
        return True

    def rows(self, x: Tensor, activation: str | None = None) -> Tensor:
        """The activated convolution of (B, H, W, C)."""
        refuse_derivatives(x)
        return depthwise_conv(x, self.weight, self.bias, activation=activation, out_dtype=self.dtype)


def depthwise_silu(conv: nn.Module, x: Tensor) -> Tensor:
    """silu(conv(x)), (B, H, W, C) -> the same; in one pass where that can be and nobody watches what is between."""
    if type(conv) in (DepthwiseConv, PackedDepthwiseConv) and unwatched(conv) and conv.takes(x):
        return conv.rows(x, "silu")
    return F.silu(conv(x))


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
