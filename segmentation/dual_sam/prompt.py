"""The multi-level coupled prompt (MCP): a stream of tokens of its own that mixes the two views at every level.

Legend: B images, C channels of the prompt, C_k H_k W_k those of the maps of level k, N = h w places of the prompt,
which has one per patch of the image. In SAM all C_k are C and all maps lie on the prompt's grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from segmentation.dual_sam.layers import conv_bn_gelu


class CrossAttention(nn.Module):
    """Queries of the image, keys of its gamma copy, values of the prompt."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, image: Tensor, gamma: Tensor, prompt: Tensor) -> Tensor:
        """Three of (B, N, C) -> (B, N, C)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, image), (self.k, gamma), (self.v, prompt))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PromptLevel(nn.Module):
    """One level: refines the prompt and derives what is added to the maps of either view.

    Maps of other channels than the prompt's are brought to these by a linear layer; maps of another grid are averaged
    to the prompt's, and what is added to them is interpolated back.

    Args:
        in_channels: of the maps, C_k.
        dim: of the prompt, C.
        heads: of its self-attention and of the cross-attention.
        legacy: read the values of the cross-attention as the original code does, which takes the prompt's numbers,
            channel last, for channel first, so that they change their places; and leave the gates untrained at the
            zeros that uninitialised memory mostly holds.
    """

    def __init__(self, in_channels: int, dim: int, heads: tuple[int, int], legacy: bool = False) -> None:
        super().__init__()
        self.legacy = legacy
        same = in_channels == dim
        self.enter = nn.Identity() if same else nn.Conv2d(in_channels, dim, 1)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads[0], qkv_bias=True)
        self.cross = CrossAttention(dim, heads[1])
        self.mlp_prompt, self.mlp_cross = Mlp(dim, 4 * dim), Mlp(dim, 4 * dim)
        self.to_image, self.to_gamma = conv_bn_gelu(dim, in_channels, 1), conv_bn_gelu(dim, in_channels, 1)
        # the maps begin as the encoder gives them
        gates = torch.zeros(2)
        if legacy:
            self.register_buffer("gates", gates, persistent=False)
        else:
            self.gates = nn.Parameter(gates)

    def forward(self, prompt: Tensor, image: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt (B, C, h, w), maps (B, C_k, H_k, W_k) of both views -> the three, changed."""
        grid = prompt.shape[-2:]
        p = _tokens(prompt)
        p = p + self.attn(self.norm1(p))
        p = p + self.mlp_prompt(self.norm2(p))
        a, b = (self.norm1(_tokens(_resized(self.enter(x), grid))) for x in (image, gamma))
        values = self.norm1(p)
        if self.legacy:
            values = values.reshape(values.shape[0], values.shape[2], values.shape[1]).transpose(1, 2)
        c = p + self.cross(a, b, values)
        c = _map(c + self.mlp_cross(self.norm2(c)), grid)
        size = image.shape[-2:]
        image = image + self.gates[0] * _resized(self.to_image(c), size)
        gamma = gamma + self.gates[1] * _resized(self.to_gamma(c), size)
        return _map(p, grid), image, gamma


class CoupledPrompt(nn.Module):
    """All levels, and the embedding of the sum of both views that they begin with.

    Args:
        in_channels: of the maps of the levels, from the first.
        dim: channels of the prompt.
        img_size: pixels of the images that the position embedding is for; for others it is interpolated.
        patch_size: pixels of a place of the prompt.
        heads: of self-attention and cross-attention.
        legacy: see `PromptLevel`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int = 768,
        img_size: int = 512,
        patch_size: int = 16,
        heads: tuple[int, int] = (12, 8),
        legacy: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch_size, patch_size)
        side = img_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, side, side))
        self.levels = nn.ModuleList(PromptLevel(channels, dim, tuple(heads), legacy) for channels in in_channels)

    def forward(
        self, views: Tensor, image: Sequence[Tensor], gamma: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(B, 3, H, W) sum of the two views and their maps, by level -> the maps, coupled."""
        p = self.embed(views)
        position = self.pos_embed
        if position.shape[-2:] != p.shape[-2:]:
            position = F.interpolate(position, p.shape[-2:], mode="bicubic", antialias=True)
        p = p + position
        coupled = []
        for level, a, b in zip(self.levels, image, gamma, strict=True):
            p, a, b = level(p, a, b)
            coupled.append((a, b))
        return [a for a, _ in coupled], [b for _, b in coupled]


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def _map(x: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, N, C) -> (B, C, h, w)."""
    return x.transpose(1, 2).unflatten(2, tuple(grid))


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """To fewer places by averages, to more by interpolation."""
    if x.shape[-2:] == tuple(size):
        return x
    if x.shape[-2] >= size[0]:
        return F.adaptive_avg_pool2d(x, tuple(size))
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
