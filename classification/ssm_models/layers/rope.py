"""Rotary position embedding of a grid of tokens: Su et al. 2021, "RoFormer", in the two-axis form of EVA-02.

Shapes: B batch, L tokens, C channels, h w grid.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

THETA = 10000.0


class GridRope(nn.Module):
    """Rotates adjacent pairs of channels, the first half of C by the row of a token, the second half by its column.

    Args:
        dim: C, a multiple of 4.
        grid: (h, w) of the training images; its tables are part of the checkpoints. Others are made when they come.
        pretrained_side: of the grid at which positions are 0, 1, 2, ...; others are scaled to its extent.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        pretrained_side: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % 4:
            raise ValueError(f"embed_dim={dim} must be a multiple of 4 for rotary position embeddings")
        self.dim, self.grid, self.pretrained_side = dim, tuple(grid), pretrained_side
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(grid[0] * grid[1], dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The tables anew; they are computed, not learned."""
        cos, sin = self.tables(*self.grid, device=self.freqs_cos.device)
        self.freqs_cos.copy_(cos)
        self.freqs_sin.copy_(sin)

    def tables(self, h: int, w: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """(h * w, C) each."""
        half = self.dim // 2
        # written so that the tables equal those in the checkpoints to the last bit
        frequencies = 1.0 / (THETA ** (torch.arange(0, half, 2, device=device, dtype=torch.float32) / half))

        def angles(n: int) -> Tensor:
            position = torch.arange(n, device=device, dtype=torch.float32) / n * self.pretrained_side
            return torch.outer(position, frequencies).repeat_interleave(2, dim=1)  # (n, C / 2)

        rows, columns = angles(h)[:, None].expand(h, w, half), angles(w)[None].expand(h, w, half)
        table = torch.cat([rows, columns], dim=2).flatten(0, 1)
        return table.cos(), table.sin()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h*w, C) -> the same, rotated."""
        if tuple(grid) == self.grid:
            cos, sin = self.freqs_cos, self.freqs_sin
        else:
            cos, sin = self.tables(*grid, device=x.device)
        a, b = x.unflatten(2, (-1, 2)).unbind(3)
        turned = torch.stack([-b, a], 3).flatten(2)
        return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
