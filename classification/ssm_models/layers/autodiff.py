"""Memory and layouts where derivatives are taken, by `torch.func` too, which has neither saved activations to drop nor
layouts in memory to ask for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssm_ops import is_transformed


def recomputed(function: Callable, *args):
    """``function(*args)``, which the backward pass computes a second time instead of keeping its activations. Under
    transforms of `torch.func`, which do not support that, it is computed once, to the same result."""
    if not torch.is_grad_enabled() or is_transformed():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)


def to_channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) in the memory of (B, H, W, C), but as it is under transforms of `torch.func`: a matter of speed."""
    return x if is_transformed() else x.contiguous(memory_format=torch.channels_last)
