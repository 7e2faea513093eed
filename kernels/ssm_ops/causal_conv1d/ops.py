"""The registered operators ``ssm_ops::causal_conv1d_fwd`` and ``_bwd``: schemas and fakes. Mathematics: api.py.

Shapes: B batch, D channels, L length, K taps.

Nothing is saved but the inputs: the backward forms the sum before the activation again.
An absent gradient of the bias is a tensor without elements, because an operator's arity is fixed.
"""

from __future__ import annotations

import torch

from .._library import SINGLE_AND_HALF, declare, register

CAUSAL_CONV1D = declare("causal_conv1d", __package__, SINGLE_AND_HALF, cpu=("cpu",), triton=("cuda",), reference=None)


def is_channels_last(x: torch.Tensor) -> bool:
    """Do the channels of a token of (B, D, L) lie side by side?"""
    return x.stride(1) == 1


def result_like(x: torch.Tensor, impl: str, dtype: torch.dtype) -> torch.Tensor:
    """(B, D, L), not filled: "cpu" keeps the layout of channels-last inputs, all others write contiguous results."""
    if impl == "cpu" and is_channels_last(x):
        return x.new_empty(x.mT.shape, dtype=dtype).mT
    return x.new_empty(x.shape, dtype=dtype)


def _fake_fwd(x, weight, bias, silu, reverse, impl):
    return result_like(x, impl, x.dtype)


def _fake_bwd(dout, x, weight, bias, silu, reverse, impl):
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return result_like(x, impl, x.dtype), d_weight, x.new_empty(0) if bias is None else torch.empty_like(bias)


causal_conv1d_fwd = register(
    CAUSAL_CONV1D,
    "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str impl) -> Tensor",
    _fake_fwd,
    "forward",
)

causal_conv1d_bwd = register(
    CAUSAL_CONV1D,
    "causal_conv1d_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str impl) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fake_bwd,
    "backward",
)
