"""Addition and norm by the compiled CPU library (csrc/cpu/add_norm.cpp), all dtypes as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._interface import Buffer, NormArguments
from ..._native import call


def forward(
    x, branch, weight, bias, eps: float, rms: bool, sum_dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(sum, normed)"""
    x = x.contiguous()  # names, because copies must live until the call is over
    branch = None if branch is None else branch.contiguous()
    total = x if branch is None else torch.empty_like(x, dtype=sum_dtype)
    out = torch.empty_like(x, dtype=out_dtype)
    if x.numel():
        weight, bias = (None if t is None else t.detach().float().contiguous() for t in (weight, bias))
        a = NormArguments(*map(Buffer.of, (x, branch, None if branch is None else total, out, weight, bias)))
        a.dim = x.shape[-1]
        a.rows, a.eps, a.rms, a.threads = x.numel() // a.dim, eps, rms, torch.get_num_threads()
        call("cpu", "add_norm_forward", a)
    return total, out
