"""The depthwise convolution by the compiled CPU library (csrc/cpu/depthwise_conv.cpp), all dtypes as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._interface import Buffer, DepthwiseArguments, Rows
from ..._library import SINGLE_AND_HALF
from ..._native import call


def forward(x, weight, bias, silu: bool, out_dtype: torch.dtype) -> Tensor:
    """(B, H, W, C)"""
    x = x if x.stride(3) == 1 else x.contiguous()  # names, because copies must live until the call is over
    dtype = out_dtype if out_dtype in SINGLE_AND_HALF else torch.float32
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    weight, bias = (None if t is None else t.detach().float().contiguous() for t in (weight, bias))
    a = DepthwiseArguments(Rows.of(x), *map(Buffer.of, (weight, bias, out)))
    a.batch, a.height, a.width, a.dim = x.shape
    a.silu, a.threads = silu, torch.get_num_threads()
    call("cpu", "depthwise_conv_forward", a)
    return out.to(out_dtype)
