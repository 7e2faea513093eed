"""The simple feature pyramid of plain backbones: four levels from one map.

Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection",
https://arxiv.org/abs/2203.16527, section 3; Vim's detectors use it.

Legend: B batch, C channels of the map, D of the levels, H W of the map (stride 16).
"""

from __future__ import annotations

from functools import partial

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor

from .conv2d import Conv2d

_norm = partial(LayerNorm2d, eps=1e-6)


class _Conv(Conv2d):
    """A convolution without bias, normed."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.norm = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """Levels of strides 4, 8, 16, 32 from a map of stride 16, and coarser ones by max-pooling.

    Keys are `simfp_2` to `simfp_5`, by the logarithm of the stride, as in the published models.

    Args:
        in_channels: C, a number or a list of one, as the frameworks' configs have it.
        out_channels: D.
        num_outs: levels, 4 or 5.
    """

    def __init__(self, in_channels: int | list[int], out_channels: int = 256, num_outs: int = 5):
        super().__init__()
        [dim] = [in_channels] if isinstance(in_channels, int) else in_channels
        if num_outs not in (4, 5):
            raise ValueError(f"num_outs={num_outs} is neither 4 nor 5")
        self.num_outs = num_outs

        def level(*resize: nn.Module, channels: int = dim) -> nn.Sequential:
            return nn.Sequential(*resize, _Conv(channels, out_channels, 1), _Conv(out_channels, out_channels, 3))

        def up(channels: int) -> nn.Module:
            return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)

        self.simfp_2 = level(up(dim), _norm(dim // 2), nn.GELU(), up(dim // 2), channels=dim // 4)
        self.simfp_3 = level(up(dim), channels=dim // 2)
        self.simfp_4 = level()
        self.simfp_5 = level(nn.MaxPool2d(2))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """((B, C, H, W),) -> (B, D, 4H, 4W), (B, D, 2H, 2W), (B, D, H, W), (B, D, H/2, W/2) and a fifth of H/4."""
        [x] = maps
        levels = [self.simfp_2(x), self.simfp_3(x), self.simfp_4(x), self.simfp_5(x)]
        if self.num_outs == 5:
            # every second pixel, as Detectron2 does
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return tuple(levels)
