"""Learned position embeddings of token sequences with class tokens, brought to another grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

_MOST_VALUES = 1 << 28  # of a table, before and after: a gigabyte of float32


def class_token_rows(mode: str, patches: int) -> tuple[int, ...]:
    """Places of the class tokens in a sequence of `patches` patches and them: "none", "head", "middle", "tail" or
    "double"."""
    return {
        "none": (),
        "head": (0,),
        "middle": (patches // 2,),
        "tail": (patches,),
        "double": (0, patches + 1),
    }[mode]


def insert_rows(patches: Tensor, tokens: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """(B, M, C) and tokens (B, 1, C) -> (B, M + tokens, C) with token i at place rows[i], in ascending order."""
    for token, row in zip(tokens, rows, strict=True):
        patches = torch.cat([patches[:, :row], token, patches[:, row:]], 1)
    return patches


def split_rows(x: Tensor, rows: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The way back: (B, M + tokens, C) -> (B, M, C) and the tokens, (B, 1, C) each."""
    if not rows:
        return x, []
    edges = [-1, *rows, x.shape[1]]
    patches = torch.cat([x[:, a + 1 : b] for a, b in zip(edges[:-1], edges[1:], strict=True)], 1)
    return patches, [x[:, row : row + 1] for row in rows]


def grid_with(patches: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The first of `grids` that has so many patches, or else the square one that has."""
    side = math.isqrt(max(patches, 0))
    return next((grid for grid in (*grids, (side, side)) if math.prod(grid) == patches > 0), None)


def resize_pos_embed(
    pos_embed: Tensor,
    old_grid: Sequence[int],
    new_grid: Sequence[int],
    old_rows: Sequence[int],
    new_rows: Sequence[int],
) -> Tensor:
    """Bicubic interpolation of the rows of patches; rows of class tokens stay as they are and go to their new places.

    timm's `resample_abs_pos_embed`, which knows class tokens at the start alone, on the patches.

    Args:
        pos_embed: (1, h*w + tokens, C).
        old_grid, new_grid: (h, w) of the patches.
        old_rows, new_rows: places of the class tokens, in order. Without new ones those of old ones are left out.

    Returns:
        (1, new h * new w + number of new rows, C).
    """
    if (
        pos_embed.ndim != 3
        or pos_embed.numel() > _MOST_VALUES
        or math.prod(new_grid) * pos_embed.shape[2] > _MOST_VALUES
    ):
        raise ValueError(f"pos_embed of shape {tuple(pos_embed.shape)} is not brought to a grid of {tuple(new_grid)}")
    patches, tokens = split_rows(pos_embed, old_rows)
    if patches.shape[1] != old_grid[0] * old_grid[1]:
        raise ValueError(
            f"pos_embed of {pos_embed.shape[1]} rows is not one of a {old_grid[0]}x{old_grid[1]} grid with "
            f"{len(old_rows)} class tokens"
        )
    if tuple(old_grid) != tuple(new_grid):
        patches = resample_abs_pos_embed(patches, list(new_grid), list(old_grid), num_prefix_tokens=0, antialias=False)
    return insert_rows(patches, tokens if new_rows else [], new_rows)
