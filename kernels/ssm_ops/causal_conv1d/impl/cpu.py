"""Causal convolution by the compiled CPU library (csrc/cpu/causal_conv1d.cpp).

Half precision is converted around it, but with channels-last tokens, which are taken as they are.

Shapes: B batch, D channels, L length, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._interface import Buffer, ConvArguments, Map
from ..._native import call
from ..api import is_channels_last, result_like


def _run(direction: str, x, weight, bias, silu: bool, reverse: bool, dout=None, **results: Tensor) -> None:
    dim, taps = weight.shape
    # names, because copies must live until the call is over
    given = x if is_channels_last(x) else x.float()
    if dout is not None:
        dout = dout.to(x.dtype).mT.contiguous().mT if is_channels_last(x) else dout.float()
    parameters = [None if t is None else t.float().contiguous() for t in (weight, bias)]
    a = ConvArguments(Map.of(given, dim), Map.of(dout, dim), *map(Buffer.of, parameters))
    for name, t in results.items():
        setattr(a, name, Buffer.of(t))
    a.batch, a.dim, a.length, a.taps = *x.shape, taps
    a.silu, a.reverse, a.channels_last, a.threads = silu, reverse, is_channels_last(x), torch.get_num_threads()
    call("cpu", f"causal_conv1d_{direction}", a)


def _memory(x: Tensor) -> Tensor:
    """A result of `result_like` in the order of its memory: (B, D, L), or (B, L, D) with channels last."""
    return x.mT if is_channels_last(x) else x


def forward(x, weight, bias, silu: bool, reverse: bool) -> Tensor:
    """As `reference.forward`."""
    out = result_like(x, "cpu", x.dtype if is_channels_last(x) else torch.float32)
    _run("forward", x, weight, bias, silu, reverse, out=_memory(out))
    return out.to(x.dtype)


def backward(dout, x, weight, bias, silu: bool, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`."""
    dx = result_like(x, "cpu", x.dtype if is_channels_last(x) else torch.float32)
    dweight = x.new_empty((x.shape[0], *weight.shape), dtype=torch.float32)
    dbias = x.new_empty(x.shape[:2], dtype=torch.float32)
    _run("backward", x, weight, bias, silu, reverse, dout, dx=_memory(dx), dweight=dweight, dbias=dbias)
    return (
        dx.to(x.dtype),
        dweight.sum(0).to(weight.dtype),
        x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype),
    )
