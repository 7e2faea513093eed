"""The MLP branch of a VSS block, plain or gated, for both layouts."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from .act import get_act
from .autodiff import recomputed
from .linear import get_linear, of_channels, two_maps


class Mlp(nn.Module):
    """fc1 -> act -> drop -> fc2 -> drop. With `gated`, fc1 yields (a, g) and fc2 takes a * act(g).

    Shapes: (B, H, W, C), or (B, C, H, W) with `channel_first`.

    Attributes:
        recompute: compute the activation a second time in the backward pass instead of keeping it. It is the largest
            tensor of a block, and among the cheapest.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: str = "gelu",
        drop: float = 0.0,
        gated: bool = False,
        channel_first: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        linear = get_linear(channel_first)
        self.gated = gated
        self.recompute = False
        self.channel_first = channel_first
        self.fc1 = linear(dim, hidden_dim * (2 if gated else 1), **dd)
        self.act = get_act(act_layer)
        self.fc2 = linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated and not (self.training and self.drop.p):
            y = self._in_one_pass(x)
            if y is not None:
                return self.drop(y)
        x = of_channels(self.fc1, x, self.channel_first)
        # recomputing stops again before the product of fc2, which needs no result of its own
        return recomputed(self._from_hidden, x) if self.recompute else self._from_hidden(x)

    def _in_one_pass(self, x: Tensor) -> Tensor | None:
        y = two_maps(self.fc1, self.act, self.fc2, x.permute(0, 2, 3, 1) if self.channel_first else x)
        return y.permute(0, 3, 1, 2) if y is not None and self.channel_first else y

    def _from_hidden(self, x: Tensor) -> Tensor:
        if self.gated:
            x, gate = x.chunk(2, dim=1 if self.channel_first else -1)
            x = x * self.act(gate)
        else:
            x = self.drop(self.act(x))
        return self.drop(of_channels(self.fc2, x, self.channel_first))
