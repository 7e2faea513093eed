"""Addition and norm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._common import state_dtype
from ..._library import no_autocast


def forward(
    x, branch, weight, bias, eps: float, rms: bool, sum_dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(sum, normed)"""
    wide = state_dtype(sum_dtype)
    with no_autocast(x.device.type):
        total = x.to(wide) if branch is None else x.to(wide) + branch.to(wide)
        shape = x.shape[-1:]
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
        if rms:
            normed = F.rms_norm(total, shape, weight, eps)
            normed = normed if bias is None else normed + bias
        else:
            normed = F.layer_norm(total, shape, weight, bias, eps)
    return x if branch is None else total.to(sum_dtype), normed.to(out_dtype)
