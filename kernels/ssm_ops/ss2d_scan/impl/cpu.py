"""SS2D's scan by the compiled CPU library (csrc/cpu/ss2d_scan.cpp). Half precision is converted around it."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..._native import as_float, library, pointer
from ...cross_scan import cross_scan
from ..ops import STATE_CHUNK

_POINTERS = ("proj", "dt_weight", "A", "D", "bias", "states", "dproj", "ddt_weight", "dA", "dD", "dbias")
_SIZES = ("batch", "dim", "length", "state", "rank", "parts")

# blocks of channels that may sum dproj side by side; fixed, so that results do not depend on the threads
_MIN_TASKS = 8


class _Pixels(ctypes.Structure):
    """`Pixels` of ss2d_scan.cpp: a map (batch, channel, pixel) with its strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "channel", "pixel"))]


class _Arguments(ctypes.Structure):
    """`Ss2dArguments` of ss2d_scan.cpp."""

    _fields_ = [
        *((name, _Pixels) for name in ("x", "y", "dy", "dx")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("order", ctypes.c_void_p * 4),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("threads", ctypes.c_int32),
    ]


def _one_pixel_stride(x: Tensor) -> Tensor:
    """x (B, D, H, W) in a form whose pixels lie at equal distances; a copy only where they do not."""
    return x if x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3) else x.contiguous()


def _pixels(x: Tensor) -> _Pixels:
    batch, channel, row, pixel = x.stride()
    return _Pixels(x.data_ptr(), batch, channel, row if x.shape[3] == 1 else pixel)


@functools.lru_cache(maxsize=32)
def _orders(height: int, width: int, scans: str) -> Tensor:
    """(K, L) int32: the pixel at every place of every route."""
    image = torch.arange(height * width, dtype=torch.int32).view(1, 1, height, width)
    return cross_scan(image, scans=scans, impl="reference")[0, :, 0].contiguous()


class _Inputs:
    """The inputs in the layout of the library, kept alive while it runs."""

    def __init__(self, x, proj, dt_weight, A, D, dt_bias, scans):
        batch, dim, height, width = x.shape
        self.x = _one_pixel_stride(as_float(x))
        self.proj = as_float(proj).contiguous()
        self.dt_weight = dt_weight.transpose(1, 2).contiguous()  # (K, R, D)
        self.A = A.view(4, dim, -1).transpose(1, 2).contiguous()  # (K, N, D)
        self.D, self.dt_bias = D.contiguous(), dt_bias.contiguous()
        self.orders = _orders(height, width, scans)
        self.sizes = (batch, dim, height * width, A.shape[1], dt_weight.shape[2])

    def arguments(self, **pointers: Tensor) -> _Arguments:
        a = _Arguments(x=_pixels(self.x), threads=torch.get_num_threads())
        tensors = {"proj": self.proj, "dt_weight": self.dt_weight, "A": self.A, "D": self.D, "bias": self.dt_bias}
        for name, tensor in (tensors | pointers).items():
            setattr(a, name, pointer(tensor))
        for name, size in zip(_SIZES[:-1], self.sizes, strict=True):  # the backward sets `parts`
            setattr(a, name, size)
        for k in range(4):
            a.order[k] = self.orders[k].data_ptr()
        return a


def _run(function, arguments: _Arguments, shape) -> None:
    if function(ctypes.byref(arguments)):
        raise MemoryError(f"ss2d_scan: no memory for the buffers of a map {tuple(shape)}; use smaller images")


def forward(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype) -> tuple[Tensor, Tensor]:
    """(out, states); shapes in ops.py."""
    inputs = _Inputs(x, proj, dt_weight, A, D, dt_bias, scans)
    batch, dim, length, n_state, _ = inputs.sizes
    states = torch.empty(-(-length // STATE_CHUNK["cpu"]) + 1, batch, 4, n_state, dim)
    out = torch.empty_like(x, dtype=torch.float32)
    a = inputs.arguments(states=states)
    a.y = _pixels(out)
    _run(library().ss2d_scan_forward, a, x.shape)
    return out.to(out_dtype), states


def backward(dout, x, proj, dt_weight, A, D, dt_bias, states, scans) -> tuple[Tensor, ...]:
    """Gradients of (x, proj, dt_weight, A, D, dt_bias)."""
    inputs = _Inputs(x, proj, dt_weight, A, D, dt_bias, scans)
    batch, dim, length, n_state, rank = inputs.sizes
    dy = _one_pixel_stride(as_float(dout))
    dx = torch.empty_like(x, dtype=torch.float32)
    parts = min(-(-dim // 16), -(-_MIN_TASKS // max(batch, 1)))
    dproj = torch.zeros(parts, batch, length, 4 * (rank + 2 * n_state))
    ddt_weight, dA = torch.empty(batch, 4, rank, dim), torch.empty(batch, 4, n_state, dim)
    dD, dbias = torch.empty(batch, 4, dim), torch.empty(batch, 4, dim)
    a = inputs.arguments(states=states, dproj=dproj, ddt_weight=ddt_weight, dA=dA, dD=dD, dbias=dbias)
    a.dy, a.dx, a.parts = _pixels(dy), _pixels(dx), parts
    _run(library().ss2d_scan_backward, a, x.shape)
    return (
        dx.to(x.dtype),
        dproj.sum(0).view(proj.shape).to(proj.dtype),
        ddt_weight.sum(0).transpose(1, 2).contiguous(),
        dA.sum(0).transpose(1, 2).reshape(A.shape),
        dD.sum(0).flatten(),
        dbias.sum(0).flatten(),
    )
