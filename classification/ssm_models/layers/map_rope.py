"""Rotary position embedding of maps of any size: Su et al. 2021, "RoFormer", by row and column.

Han et al. 2024, "Demystify Mamba in Vision: A Linear Attention Perspective" (https://arxiv.org/abs/2405.16605), whose
form VSSD took: positions are the whole numbers 0, 1, 2, ... at every size, nothing is interpolated, and after the
rotation the product of two tokens depends on the rows and columns between them alone. No parameters, no buffers.

Shapes: B batch, H W map, G groups, N features, a multiple of 4; adjacent features are a pair, N/2 pairs. The first N/4
pairs turn with the row, the others with the column, pair k of each by 10000^(-k / (N/4)) radians per step.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BASE = 10000.0


def rotations(height: int, width: int, features: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of all tokens, (H, W, N/2) each, on the device of `like`, in float32, or in
    float64 where `like` is."""
    quarter = features // 4
    options = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    frequencies = BASE ** (-torch.arange(quarter, **options) / quarter)
    rows, columns = (torch.outer(torch.arange(n, **options), frequencies) for n in (height, width))

    def of_tokens(rows: Tensor, columns: Tensor) -> Tensor:
        shape = (height, width, quarter)
        return torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=2)

    return of_tokens(rows.cos(), columns.cos()), of_tokens(rows.sin(), columns.sin())


@functools.lru_cache(maxsize=32)
def kept_rotations(
    height: int, width: int, features: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`rotations`, formed once for every size, for calls of which nobody wants a derivative."""
    return rotations(height, width, features, torch.empty(0, device=device, dtype=dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, W, G, N) -> the same, every pair turned by its angle; computed in the dtype of the tables."""
    a, b = x.to(cos.dtype).unflatten(4, (-1, 2)).unbind(5)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # for the groups
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=5).flatten(4).to(x.dtype)
