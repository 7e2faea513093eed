"""From image to a sequence of patches."""

from __future__ import annotations

import torch
import torch.nn as nn
from timm.layers import lecun_normal_
from torch import Tensor

from .conv2d import Conv2d


class PatchEmbed(nn.Module):
    """Patches of an image as tokens; they overlap where the stride is smaller than a patch."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        stride: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.proj = Conv2d(in_chans, dim, patch_size, stride, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return tuple((side - self.patch_size) // self.stride + 1 for side in (height, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, h*w, C)"""
        return self.proj(x).flatten(2).transpose(1, 2)
