"""The depthwise convolution in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._common import state_dtype
from ..._library import no_autocast


def forward(x, weight, bias, silu: bool, out_dtype: torch.dtype) -> Tensor:
    """(B, H, W, C)"""
    wide = state_dtype(x.dtype)
    with no_autocast(x.device.type):
        x, weight, bias = (None if t is None else t.to(wide) for t in (x, weight, bias))
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3]).permute(0, 2, 3, 1)
        return (F.silu(y) if silu else y).to(out_dtype).contiguous()
