"""Norms for both memory layouts: NHWC ("channel-last") and NCHW ("channel-first").

A model is channel-first exactly if its norm is "ln2d" or "bn". Parameters have the same names and shapes in both
layouts, so checkpoints move freely between them.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor
from torchvision.ops import Permute

from ssm_ops import add_norm, runs_eagerly

from . import onednn

_NORMS = {
    "ln": partial(nn.LayerNorm, eps=1e-5),
    "ln2d": partial(LayerNorm2d, eps=1e-5),
    "bn": nn.BatchNorm2d,
}


def get_norm(name: str):
    """Constructor `norm(channels)` for "ln" (NHWC), "ln2d" or "bn" (both NCHW)."""
    if name.lower() not in _NORMS:
        raise ValueError(f"norm_layer={name!r} is not one of {', '.join(_NORMS)}")
    return _NORMS[name.lower()]


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) for a product to read: in autocast's dtype at once, where nobody wants a derivative of it or watches."""
    return add_normed(norm, x, None)[1]


def add_normed(norm: nn.Module, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """x + branch, and its `normed`; in one pass where that can be."""
    nchw = isinstance(norm, LayerNorm2d)
    tokens = [t.permute(0, 2, 3, 1) if nchw and t is not None else t for t in (x, branch)]
    if not _fuses(norm, *tokens):
        x = x if branch is None else x + branch
        return x, norm(x)
    dtype = onednn.dtype_of_product(x) if torch.is_autocast_enabled("cpu") else norm.weight.dtype
    rms = isinstance(norm, RMSNorm)
    bias = None if rms else norm.bias
    results = add_norm(*tokens, norm.weight, bias, eps=norm.eps, rms=rms, out_dtype=dtype)
    return tuple(t.permute(0, 3, 1, 2) for t in results) if nchw else results


def _fuses(norm: nn.Module, x: Tensor, branch: Tensor | None) -> bool:
    """Whether the operator may stand for the sum and the norm of tokens (..., C)."""
    if type(norm) not in (nn.LayerNorm, LayerNorm2d, RMSNorm) or x.device.type != "cpu":
        return False
    whole = x.is_contiguous() and (branch is None or branch.is_contiguous())
    return whole and runs_eagerly(x, branch, norm.weight) and onednn.unwatched(norm)


def is_channel_first(norm_layer: str) -> bool:
    return norm_layer.lower() in ("ln2d", "bn")


def to_channel_last() -> Permute:
    """(B, C, H, W) -> (B, H, W, C)"""
    return Permute([0, 2, 3, 1])


def to_channel_first() -> Permute:
    """(B, H, W, C) -> (B, C, H, W)"""
    return Permute([0, 3, 1, 2])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension: Zhang & Sennrich 2019, computed in float32 (float64) at least.

    The result has the dtype of the weight, whatever the precision of the residual stream it reads.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if torch.jit.is_tracing():  # ONNX files of traced graphs know no such operator
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        else:
            x = F.rms_norm(x, self.weight.shape, eps=self.eps)
        return x.to(self.weight.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
