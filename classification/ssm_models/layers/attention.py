"""Multi-head self-attention over the tokens of a map."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor

from ssm_ops import is_transformed

from .linear import Linear


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over all H*W tokens, (B, H, W, C) -> the same; d = C / num_heads.

    Vaswani et al. 2017, section 3.2 (https://arxiv.org/abs/1706.03762). Queries, keys and values have no bias, the
    output has one. It runs through PyTorch's fused kernels, which raise when they are differentiated twice. The formula
    is written out with ``fused=False``, in models made after ``timm.layers.set_fused_attn(False)``, and under function
    transforms and forward-mode derivatives, which those kernels do not know.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        fused: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {dim} channels of the attention")
        self.num_heads = num_heads
        self.fused_attn = fused and use_fused_attn()
        self.to_qkv = Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.to_out = Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.to_qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn and not is_transformed():
            y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, L, d)
        else:
            y = (q * q.shape[3] ** -0.5 @ k.transpose(-2, -1)).softmax(3) @ v
        return self.to_out(y.transpose(1, 2).flatten(2).unflatten(1, (height, width)))
