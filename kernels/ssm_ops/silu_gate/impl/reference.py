"""The gate in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._common import state_dtype


def forward(y: Tensor, z: Tensor, scale: float) -> Tensor:
    """(B, L, D)"""
    wide = state_dtype(y.dtype)
    return (y.to(wide) * F.silu(z.to(wide)) * scale).to(y.dtype).contiguous()


def backward(dout: Tensor, y: Tensor, z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of (y, z)."""
    wide = state_dtype(y.dtype)
    dout, value, gate = dout.to(wide) * scale, y.to(wide), z.to(wide)
    opened = torch.sigmoid(gate)
    dy = dout * gate * opened
    dz = dout * value * opened * (1 + gate * (1 - opened))
    return dy.to(y.dtype).contiguous(), dz.to(z.dtype).contiguous()
