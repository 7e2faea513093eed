"""A convolution whose weight gets its gradients in its own strides."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


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
