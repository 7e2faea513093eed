"""Non-causal SSD in plain PyTorch: linear attention, that is two matrix products per group, the state first.

Shapes: B batch, L tokens, G groups, E = H / G heads of a group (head j = e * G + g), P channels of a head, N state.
x and y are (B, G, L, E, P), weights and steps (B, G, L, E), B and C (B, G, L, N), the state (B, G, N, E * P): all heads
of a group are one product. `bfloat16_products` is a flag of the operator: bfloat16 inputs are multiplied as they are,
and the intermediate factors are rounded to them; everything else, sums of products included, is float32 as ever.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._common import plus_product, state_dtype


def _from_groups(x: Tensor) -> Tensor:
    """(B, G, L, E, *) -> (B, L, H, *)"""
    return x.permute(0, 2, 3, 1, *range(4, x.dim())).flatten(2, 3)


class _Inputs:
    """The inputs in the layout of the products, and the weights of the tokens."""

    def __init__(self, x, dt, A, B, C, D, dt_bias, dt_softplus, positive, bfloat16_products):
        self.groups, self.dtype = B.shape[2], state_dtype(x.dtype)
        self.factor = x.dtype if bfloat16_products and x.dtype == torch.bfloat16 else self.dtype
        self.x = self.to_groups(x)
        self.B, self.C = (t.to(self.dtype).transpose(1, 2) for t in (B, C))  # (B, G, L, N)
        raw = dt.to(self.dtype)
        self.raw = self.to_groups(raw if dt_bias is None else raw + dt_bias)
        self.step = F.softplus(self.raw) if dt_softplus else self.raw  # identity above 20, as everywhere in this field
        self.rate = (-A if positive else A).unflatten(0, (-1, self.groups)).t().unsqueeze(1)  # (G, 1, E)
        self.weight = self.step * self.rate
        self.D = None
        if D is not None:
            self.D = D.reshape(A.shape[0], -1).unflatten(0, (-1, self.groups)).transpose(0, 1).unsqueeze(1)

    def to_groups(self, x: Tensor) -> Tensor:
        """(B, L, H, *) -> (B, G, L, E, *)"""
        return x.to(self.dtype).unflatten(2, (-1, self.groups)).transpose(2, 3).transpose(1, 2).contiguous()

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return (left.to(self.factor) @ right.to(self.factor)).to(self.dtype)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, G, L, E * P) -> (B, G, L, E, P)"""
        return x.unflatten(3, self.x.shape[3:])


def forward(
    x, dt, A, B, C, D, dt_bias, dt_softplus: bool, positive: bool, bfloat16_products: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out (B, L, H, P), state (B, H, N, P))"""
    i = _Inputs(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, bfloat16_products)
    state = i.product(i.B.transpose(-2, -1), (i.weight.unsqueeze(-1) * i.x).flatten(3))
    y = i.split_heads(i.product(i.C, state))
    y = y if D is None else plus_product(y, i.D, i.x)
    per_head = state.unflatten(3, i.x.shape[3:]).permute(0, 3, 1, 2, 4).flatten(1, 2)
    return _from_groups(y).to(out_dtype).contiguous(), per_head.contiguous()


def backward(
    dout, x, dt, A, B, C, D, dt_bias, state, dt_softplus: bool, positive: bool, bfloat16_products: bool
) -> tuple[Tensor, ...]:
    """Gradients of (x, dt, A, B, C, D, dt_bias); absent ones as tensors without elements."""
    i = _Inputs(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, bfloat16_products)
    dy = i.to_groups(dout)
    state = state.unflatten(1, (-1, i.groups)).permute(0, 2, 3, 1, 4).flatten(3)  # (B, G, N, E * P)

    d_state = i.product(i.C.transpose(-2, -1), dy.flatten(3))
    dC = i.product(dy.flatten(3), state.transpose(-2, -1))
    dB = i.product((i.weight.unsqueeze(-1) * i.x).flatten(3), d_state.transpose(-2, -1))
    d_weighted = i.split_heads(i.product(i.B, d_state))
    dx = i.weight.unsqueeze(-1) * d_weighted
    dx = dx if D is None else plus_product(dx, i.D, dy)

    d_weight = (d_weighted * i.x).sum(-1)
    d_rate = (d_weight * i.step).sum((0, 2)).t().flatten()  # (H,)
    d_step = d_weight * i.rate
    d_raw = torch.where(i.raw > 20, d_step, d_step * torch.sigmoid(i.raw)) if dt_softplus else d_step
    d_dt = _from_groups(d_raw)
    absent = [x.new_empty(0) for _ in range(2)]  # two, for the outputs of an operator may not share memory
    dD = absent[0]
    if D is not None:
        dD = (dy * i.x).sum((0, 2)).transpose(0, 1).flatten(0, 1)  # (H, P)
        dD = (dD if D.dim() == 2 else dD.sum(1)).contiguous()
    return (
        _from_groups(dx).to(x.dtype).contiguous(),
        d_dt.to(dt.dtype).contiguous(),
        -d_rate if positive else d_rate,
        dB.transpose(1, 2).to(B.dtype).contiguous(),
        dC.transpose(1, 2).to(C.dtype).contiguous(),
        dD,
        absent[1] if dt_bias is None else d_dt.sum((0, 1)),
    )
