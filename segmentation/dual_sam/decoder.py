"""The decoder of one view: dilated fusion attention (DFAM) from the coarsest map to the finest, and eight connectivity
maps at twice the resolution of every step.

Legend: B images, L levels from the finest to the coarsest, C_l H_l W_l the channels and size of the decoder's maps.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.dual_sam.connectivity import MAPS
from segmentation.dual_sam.layers import conv_bn_gelu
from ssm_train.common.errors import UserError


class ChannelAttention(nn.Module):
    """x * sigmoid(f(mean of x) + f(maximum of x)) + x, f two 1x1 convolutions with a bottleneck."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.gate = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        for conv in (self.gate[0], self.gate[2]):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.normal_(conv.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate(F.adaptive_avg_pool2d(x, 1)) + self.gate(F.adaptive_max_pool2d(x, 1))
        return x * weight.sigmoid() + x


def fusion_attention(in_channels: int, out_channels: int) -> nn.Sequential:
    """DFAM: 1x1 convolution, channel attention, 3x3 convolution of dilation 2."""
    return nn.Sequential(
        conv_bn_gelu(in_channels, out_channels, 1),
        ChannelAttention(out_channels),
        conv_bn_gelu(out_channels, out_channels, 3, dilation=2),
    )


def lateral(in_channels: int, out_channels: int, doublings: int) -> nn.Sequential:
    """A map of the encoder at the channels of a level and at 2^doublings its own resolution."""
    if doublings == 0:
        up = nn.ConvTranspose2d(in_channels, out_channels, 1)
        return nn.Sequential(up, conv_bn_gelu(out_channels, out_channels, 3))
    steps = []
    for remaining in reversed(range(doublings)):
        channels = out_channels * 2**remaining
        steps += [nn.ConvTranspose2d(in_channels, channels, 2, 2), conv_bn_gelu(channels, channels, 3)]
        in_channels = channels
    return nn.Sequential(*steps)


def predictor(channels: int, inner: int, finest: bool) -> nn.Sequential:
    """Logits of the connectivity maps at twice the resolution; the finest does without a 3x3 convolution."""
    between = [] if finest else [conv_bn_gelu(inner, inner, 3)]
    return nn.Sequential(nn.ConvTranspose2d(channels, inner, 2, 2), *between, nn.Conv2d(inner, MAPS, 1))


class FusionDecoder(nn.Module):
    """DFAM decoder of one view.

    Args:
        in_channels: of the encoder's maps, from the first level (finest) to the last.
        doublings: of the resolution of each on its way into the decoder, whose maps must halve from level to level.
        bottom_channels: of the map that the decoder begins with; it has the size of the coarsest level.
        channels: of the decoder's levels, C_l.

    Raises:
        UserError: lists of different lengths.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        doublings: Sequence[int],
        bottom_channels: int = 256,
        channels: Sequence[int] = (32, 64, 128, 256),
    ) -> None:
        super().__init__()
        if not len(in_channels) == len(doublings) == len(channels):
            raise UserError(
                f"in_channels {in_channels}, doublings {doublings} and channels {channels} are not of the same levels"
            )
        self.laterals = nn.ModuleList(map(lateral, in_channels, channels, doublings))
        below = [*channels[1:], bottom_channels]
        self.fuse = nn.ModuleList(fusion_attention(a + b, b) for a, b in zip(below, channels, strict=True))
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(c, c, 2, 2), conv_bn_gelu(c, c, 3)) for c in channels[1:]
        )
        self.predict = nn.ModuleList(predictor(c, channels[0], level == 0) for level, c in enumerate(channels))

    def forward(self, maps: Sequence[Tensor], bottom: Tensor) -> list[Tensor]:
        """Maps of the encoder (B, in_channels, ...) and the bottom -> logits (B, 8, 2 H_l, 2 W_l) of all levels, the
        finest first."""
        logits, x = [], bottom
        for level in reversed(range(len(self.fuse))):
            side = self.laterals[level](maps[level])
            x = self.fuse[level](torch.cat([x, side], dim=1))
            logits.append(self.predict[level](x))
            if level:
                x = self.up[level - 1](x)
        return logits[::-1]
