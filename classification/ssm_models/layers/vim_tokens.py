"""Vim's way from images to a sequence of tokens: patches, class tokens, position embedding, order.

Shapes: B batch, C channels, L = patches + class tokens; h w grid of the patches, row by row.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor

from .patch_embed import PatchEmbed
from .pos_embed import class_token_rows, insert_rows, resize_pos_embed, split_rows
from .rope import GridRope
from .timm_model import TimmModel

CLS_MODES = ("middle", "head", "tail", "double", "random")


class TokenModel(TimmModel):
    """Base of a model of a sequence of tokens: what comes before its blocks, and what tells tokens apart behind them.

    A base and not a layer, because published checkpoints have these parameters at the top.

    Args:
        cls_mode: one of `CLS_MODES`.
        others: as in `VisionMamba`.

    Raises ValueError for an unknown `cls_mode`, and for images smaller than a patch.

    Attributes:
        grid: (h, w) that the position embedding is learned for.
        cls_mode: one of `CLS_MODES`, or "none" without class tokens.
        published_mode: of files with one class token, which a backbone drops but must find in their position embedding.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        stride: int,
        in_chans: int,
        embed_dim: int,
        cls_mode: str,
        if_cls_token: bool,
        if_abs_pos_embed: bool,
        drop_rate: float,
        if_rope: bool,
        pt_hw_seq_len: int,
        flip_img_sequences_ratio: float,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if cls_mode not in CLS_MODES:
            raise ValueError(f"cls_mode={cls_mode!r} is not one of {', '.join(CLS_MODES)}")
        self.published_mode = cls_mode if cls_mode in ("head", "tail") else "middle"
        self.cls_mode = cls_mode if if_cls_token else "none"
        self.in_chans = in_chans
        self.flip_ratio = flip_img_sequences_ratio

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, stride, **dd)
        self.grid = self._grid_of(*to_2tuple(img_size))
        patches = math.prod(self.grid)
        rows = class_token_rows(self._resting_mode(), patches)
        names = ("cls_token_head", "cls_token_tail") if self.cls_mode == "double" else ("cls_token",) * len(rows)
        for name in names:
            setattr(self, name, nn.Parameter(torch.empty(1, 1, embed_dim, **dd)))
        positions = nn.Parameter(torch.empty(1, patches + len(rows), embed_dim, **dd)) if if_abs_pos_embed else None
        self.pos_embed = positions
        self.pos_drop = nn.Dropout(drop_rate)
        self.rope = GridRope(embed_dim, self.grid, pt_hw_seq_len, **dd) if if_rope else None

    def reset_parameters(self) -> None:
        """The class tokens and the position embedding."""
        for token in self.class_tokens():
            trunc_normal_(token, std=0.02)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def _resting_mode(self) -> str:
        """Where the class tokens are outside of training, and in everything that is stored."""
        return "middle" if self.cls_mode == "random" else self.cls_mode

    def class_tokens(self) -> list[Tensor]:
        """(1, 1, C) each, in the order of the sequence."""
        names = {"none": (), "double": ("cls_token_head", "cls_token_tail")}.get(self.cls_mode, ("cls_token",))
        return [getattr(self, name) for name in names]

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        grid = self.patch_embed.grid(height, width)
        if min(grid) < 1:
            patch = self.patch_embed.patch_size
            raise ValueError(f"an image of {height}x{width} pixels is smaller than a patch of {patch}x{patch}")
        return grid

    def forward_stem(self, x: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """(B, in_chans, H, W) -> tokens (B, L, C), their order (L) or None for the resting one, grid of the patches."""
        self.check_images(x)
        grid = self._grid_of(*x.shape[2:])
        x = self.patch_embed(x)
        rows = class_token_rows(self._resting_mode(), x.shape[1])
        x = insert_rows(x, [token.expand(x.shape[0], -1, -1).to(x.dtype) for token in self.class_tokens()], rows)
        order = None
        if self.cls_mode == "random" and self.training:
            order = _anywhere(x.shape[1], x.device)
            x = x[:, order]
        if self.pos_embed is not None:
            pos_embed = self.pos_embed
            if grid != self.grid:
                old_rows = class_token_rows(self._resting_mode(), math.prod(self.grid))
                pos_embed = resize_pos_embed(pos_embed, self.grid, grid, old_rows, rows)
            x = x + pos_embed
        x = self.pos_drop(x)
        if self.flip_ratio > 0 and (self.training or self.flip_ratio >= 1):
            straight = torch.arange(x.shape[1], device=x.device) if order is None else order
            flip = torch.rand(1, device=x.device, dtype=torch.float32) < self.flip_ratio
            order = torch.where(flip, straight.flip(0), straight)
            x = torch.where(flip, x.flip(1), x)
        return x, order, grid

    def _rotate(self, x: Tensor, order: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Rotary positions of the patches, given in any order.

        With a class token in the middle the published models leave the first token out instead of the class token, and
        with it rotate patches of the first half by the place of their neighbour.
        """
        x = at_rest(x, order)
        head = 1 if self.cls_mode in ("head", "middle", "random", "double") else 0
        tail = 1 if self.cls_mode in ("tail", "double") else 0
        end = x.shape[1] - tail
        x = torch.cat([x[:, :head], self.rope(x[:, head:end], grid), x[:, end:]], 1)
        return x if order is None else x[:, order]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> patches (B, h*w, C) and class tokens (B, number, C)"""
        patches, tokens = split_rows(x, class_token_rows(self._resting_mode(), x.shape[1] - len(self.class_tokens())))
        return patches, torch.cat([x[:, :0], *tokens], 1)


def at_rest(x: Tensor, order: Tensor | None) -> Tensor:
    """(B, L, C) in the given order (L) -> in the resting one."""
    return x if order is None else x[:, order.argsort()]


def _anywhere(length: int, device: torch.device) -> Tensor:
    """Where each of `length` places takes its token from when the class token goes from the middle to anywhere."""
    place, at = torch.arange(length, device=device), torch.randint(length, (1,), device=device)
    middle = (length - 1) // 2
    patch = place - (place > at).long()
    return torch.where(place == at, middle, patch + (patch >= middle).long())
