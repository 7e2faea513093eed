"""LoRA on the fused qkv layer of an attention. (peft would do it for separate q and v layers; for a fused one it adapts
k as well, and it brings transformers along, which mmpretrain cannot import beside pycocotools.)"""

import math

import torch
from torch import Tensor, nn


class LoRAQKV(nn.Module):
    """qkv(x), with B(A(x)) added to q and to v. Hu et al., arXiv 2106.09685, without the factor alpha / rank.

    Args:
        qkv: layer (C -> 3 C) whose own weights stay as they are.
        rank: inner width of the two additions.
    """

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__()
        self.qkv = qkv
        dim = qkv.in_features
        self.a_q, self.b_q = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        self.a_v, self.b_v = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        for a, b in ((self.a_q, self.b_q), (self.a_v, self.b_v)):
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)  # training starts at the layer as it was

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.cat([q + self.b_q(self.a_q(x)), k, v + self.b_v(self.a_v(x))], dim=-1)
