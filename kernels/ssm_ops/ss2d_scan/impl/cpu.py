"""SS2D's scan by the compiled CPU library (csrc/cpu/ss2d_scan.cpp). Half precision is converted around it.

The library takes channels-last maps whose channels fill whole blocks of 16; others are converted and filled up here.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._native import library
from ...cross_scan import cross_scan
from ..ops import STATE_CHUNK

_BLOCK = 16
_POINTERS_IN = ("x", "dy", "proj", "dt_weight", "A", "D", "bias")
_POINTERS_OUT = ("y", "dx", "states", "dproj", "ddt_weight", "dA", "dD", "dbias", "order")
_SIZES = ("batch", "dim", "length", "state", "rank", "parts")


class _Arguments(ctypes.Structure):
    """`Ss2dArguments` of ss2d_scan.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS_IN, *_POINTERS_OUT)),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("threads", ctypes.c_int32),
    ]


@functools.lru_cache(maxsize=32)
def _orders(height: int, width: int, scans: str) -> Tensor:
    """(K, L) int32: the pixel at every place of every route."""
    image = torch.arange(height * width, dtype=torch.int32).view(1, 1, height, width)
    return cross_scan(image, scans=scans, impl="reference")[0, :, 0].contiguous()


def _pixel_major(x: Tensor, missing: int) -> Tensor:
    """(B, D, H, W) -> (B, H, W, D + missing) float32, contiguous; a copy only where x is something else."""
    x = x.float().permute(0, 2, 3, 1)
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def _fill_channels(x: Tensor, missing: int) -> Tensor:
    """(4, D, *) -> (4, D + missing, *), contiguous"""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x.contiguous()


def _like(x: Tensor, given: Tensor) -> Tensor:
    """(B, H, W, D + missing) -> (B, D, H, W) with the strides of `given`, if that is dense, as the fake says."""
    x = x[..., : given.shape[1]].permute(0, 3, 1, 2)
    wanted = torch.empty_like(given, dtype=x.dtype)
    return x if x.stride() == wanted.stride() else wanted.copy_(x)


class _Call:
    """One call: the inputs in the layout of the library, kept alive while it runs, and the argument block."""

    def __init__(self, x, proj, dt_weight, A, D, dt_bias, scans):
        batch, dim, height, width = x.shape
        self.missing = -dim % _BLOCK
        self.batch, self.dim, self.blocks = batch, dim + self.missing, -(-dim // _BLOCK)
        self.length, self.state, self.rank = height * width, A.shape[1], dt_weight.shape[2]
        self.shape = (batch, height, width, self.dim)
        self.inputs = {
            "x": _pixel_major(x, self.missing),
            "proj": proj.float().contiguous(),
            "dt_weight": _fill_channels(dt_weight, self.missing),
            "A": _fill_channels(A.view(4, dim, -1), self.missing),
            "D": _fill_channels(D.view(4, dim), self.missing),
            "bias": _fill_channels(dt_bias.view(4, dim), self.missing),
            "order": _orders(height, width, scans),
        }

    def run(self, function, parts: int, **more: Tensor) -> None:
        a = _Arguments(*(None,) * (len(_POINTERS_IN) + len(_POINTERS_OUT)))
        for name, tensor in (self.inputs | more).items():
            setattr(a, name, tensor.data_ptr())
        a.batch, a.dim, a.length, a.state, a.rank = self.batch, self.dim, self.length, self.state, self.rank
        a.parts, a.threads = parts, torch.get_num_threads()
        if function(ctypes.byref(a)):
            raise MemoryError(f"ss2d_scan: no memory for the buffers of a map {self.shape}; use fewer threads")


def forward(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype) -> tuple[Tensor, Tensor]:
    """(out, states); shapes in ops.py."""
    call = _Call(x, proj, dt_weight, A, D, dt_bias, scans)
    states = torch.empty(-(-call.length // STATE_CHUNK["cpu"]) + 1, call.batch, 4, call.state, call.dim)
    out = torch.empty(call.shape)
    parts = _forward_parts(call.batch, call.blocks, torch.get_num_threads())
    call.run(library().ss2d_scan_forward, parts, y=out, states=states)
    return _like(out.to(out_dtype), x), states[..., : x.shape[1]].contiguous()


def _forward_parts(batch: int, blocks: int, threads: int) -> int:
    """How many parts the channels are cut into: as few as keep all threads equally busy. The results do not tell."""

    def longest(parts: int) -> int:
        return -(-batch * parts // threads) * -(-blocks // parts)  # tasks of a thread, times blocks of a task

    return min(range(1, min(blocks, 2 * threads) + 1), key=longest)


def _backward_parts(batch: int, blocks: int) -> int:
    """How many parts give gradients of `proj`, to be added: a power of two that keeps 16 threads busy, each part of at
    least two blocks. It does not depend on the number of threads: the same call gives the same bits everywhere."""
    parts = 1
    while 4 * parts <= blocks and parts * batch < 16:
        parts *= 2
    return parts


def backward(dout, x, proj, dt_weight, A, D, dt_bias, states, scans) -> tuple[Tensor, ...]:
    """Gradients of (x, proj, dt_weight, A, D, dt_bias)."""
    call = _Call(x, proj, dt_weight, A, D, dt_bias, scans)
    dy, states = _pixel_major(dout, call.missing), F.pad(states, (0, call.missing)) if call.missing else states
    dx = torch.empty(call.shape)
    parts = _backward_parts(call.batch, call.blocks)
    dproj = torch.empty(parts, *proj.shape)
    # by channel: (B, K, D, *)
    grads = {
        name: torch.empty(call.batch, 4, call.dim, *last)
        for name, last in (("ddt_weight", (call.rank,)), ("dA", (call.state,)), ("dD", ()), ("dbias", ()))
    }
    call.run(library().ss2d_scan_backward, parts, dy=dy, dx=dx, states=states, dproj=dproj, **grads)
    ddt_weight, dA, dD, dbias = (_add(g)[:, : x.shape[1]] for g in grads.values())
    return (
        _like(dx.to(x.dtype), x),
        _add(dproj).to(proj.dtype),
        ddt_weight.contiguous(),
        dA.reshape(A.shape),
        dD.reshape(D.shape),
        dbias.reshape(dt_bias.shape),
    )


def _add(parts: Tensor) -> Tensor:
    """The sum over the first dimension."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
