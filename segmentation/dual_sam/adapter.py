"""Adapters of the two views, behind the MLPs of a shared transformer."""

import torch
from timm.layers import QuickGELU
from torch import Tensor, nn


class Adapter(nn.Module):
    """m + W2(QuickGELU(W1(LN(m)))), C -> hidden -> C."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act = QuickGELU()
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.act(self.down(self.norm(x))))


class AdaptedMlp(nn.Module):
    """An MLP that both views share, followed by an adapter for each.

    Args:
        mlp: layer (C -> C) whose own weights stay as they are.
    """

    def __init__(self, mlp: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.image, self.gamma = Adapter(dim, hidden), Adapter(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(2 B, N, C), the images before their gamma copies."""
        image, gamma = self.mlp(x).chunk(2)
        return torch.cat([self.image(image), self.gamma(gamma)])
