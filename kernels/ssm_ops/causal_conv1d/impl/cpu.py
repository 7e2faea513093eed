"""Causal convolution by the compiled CPU library (csrc/cpu/causal_conv1d.cpp). Half precision is converted around it.

Shapes: B batch, D channels, L length, K taps.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..._native import Map, as_float, as_map, library, pointer
from ..ops import is_channels_last, result_like

_POINTERS = ("weight", "bias", "out", "dx", "dweight", "dbias")


class _Arguments(ctypes.Structure):
    """`ConvArguments` of causal_conv1d.cpp."""

    _fields_ = [
        *((name, Map) for name in ("x", "dout")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("batch", "dim", "length", "taps")),
        *((name, ctypes.c_int32) for name in ("silu", "reverse", "channels_last", "threads")),
    ]


def _arguments(x, silu: bool, reverse: bool, weight: Tensor, **tensors: Tensor | None) -> _Arguments:
    a = _Arguments(x=as_map(x, x.shape[1]), silu=silu, reverse=reverse, threads=torch.get_num_threads())
    a.batch, a.dim, a.length = x.shape
    a.taps, a.channels_last = weight.shape[1], is_channels_last(x)
    for name, t in {"weight": weight, **tensors}.items():
        setattr(a, name, pointer(t))
    return a


def _as_parameters(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
    return {
        "weight": as_float(weight).contiguous(),
        "bias": None if bias is None else as_float(bias).contiguous(),
    }


def forward(x, weight, bias, silu: bool, reverse: bool) -> Tensor:
    """As `reference.forward`."""
    x32, parameters = as_float(x), _as_parameters(weight, bias)
    out = result_like(x, "cpu", torch.float32)
    a = _arguments(x32, silu, reverse, **parameters, out=out)
    library().causal_conv1d_forward(ctypes.byref(a))
    return out.to(x.dtype)


def backward(dout, x, weight, bias, silu: bool, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`."""
    x32, dout, parameters = as_float(x), as_float(dout), _as_parameters(weight, bias)
    dx = result_like(x, "cpu", torch.float32)
    dweight, dbias = torch.empty(x.shape[0], *weight.shape), torch.empty(x.shape[:2])
    a = _arguments(x32, silu, reverse, **parameters, dx=dx, dweight=dweight, dbias=dbias)
    a.dout = as_map(dout, dout.shape[1])
    library().causal_conv1d_backward(ctypes.byref(a))
    return (
        dx.to(x.dtype),
        dweight.sum(0).to(weight.dtype),
        x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype),
    )
