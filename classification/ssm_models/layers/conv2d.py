"""A convolution whose weight gets its gradients in its own strides."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from . import onednn


@register_notrace_module
class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, without other padding than zeros.

    A weight with a dimension of one element (depthwise, 1x1, of gray images) lies in memory the same for several
    strides. Its gradient comes in those of the kernel that computed it, and PyTorch leaves them; distributed training
    then warns of a mismatch, and optimizers that treat many tensors at once fall back to one by one.
    """

    def forward(self, x: Tensor) -> Tensor:
        # a traced graph is for inference, and must not depend on whether gradients were on
        trains = torch.is_grad_enabled() and not torch.jit.is_tracing()
        weight = in_own_strides(self.weight) if trains else self.weight
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def fused(self, x: Tensor, act: nn.Module) -> Tensor | None:
        """act of the convolution in one pass, without derivatives; None where oneDNN cannot."""
        if not onednn.takes(x, self.weight, self.bias) or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        return onednn.conv2d(x, self.weight, self.bias, onednn.places(self), act)

    def for_inference(self, dtype: torch.dtype) -> nn.Module:
        """The same convolution, in float32 or bfloat16, for inference on the CPU; one of another layout stays."""
        return PackedConv2d(self, dtype) if type(self) is Conv2d else self


class PackedConv2d(nn.Module):
    """A `Conv2d` whose weight lies in oneDNN's order, for inference on the CPU alone; the result is channels-last.

    The order depends on the size of the maps, and by a weight in that of another size some convolutions take a hundred
    times as long: it is packed for the first maps that come, and anew when their size changes.
    """

    def __init__(self, conv: Conv2d, dtype: torch.dtype):
        super().__init__()
        self.places = onednn.places(conv)
        self.weight = conv.weight.detach().to(dtype)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.size, self.packed = None, self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, None)

    def fused(self, x: Tensor, act: nn.Module | None) -> Tensor:
        """act of the convolution."""
        onednn.refuse_derivatives(x)
        if self.places[3] == 1 and self.size != x.shape:  # depthwise weights are small
            self.packed, self.size = onednn.pack_conv(self.weight, self.places, x.shape), x.shape
        return onednn.conv2d(x, self.packed, self.bias, self.places, act)


def activated(conv: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(conv(x)), (B, C, H, W) -> the same; in one pass where oneDNN can and nobody watches what is between."""
    y = None
    if type(conv) in (Conv2d, PackedConv2d) and onednn.known_act(act) and onednn.unwatched(conv, act):
        y = conv.fused(x, act)
    return act(conv(x)) if y is None else y


def in_own_strides(weight: Tensor) -> Tensor:
    """The same (O, I, h, w), through views whose gradients are formed by its strides; nothing is copied."""
    if 1 not in weight.shape:  # here PyTorch itself cares for the strides
        return weight
    out, channels, height, width = weight.shape
    if weight.stride() == (channels * height * width, height * width, width, 1):
        return weight.view(out, -1).view(weight.shape)
    if weight.stride() == (height * width * channels, 1, width * channels, channels):  # channels-last
        return weight.permute(0, 2, 3, 1).view(out, -1).view(out, height, width, channels).permute(0, 3, 1, 2)
    return weight
