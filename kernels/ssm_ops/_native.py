"""The compiled CPU library: a plain C interface (csrc/cpu), called through ctypes, so that it fits every torch."""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor

_FOUND = importlib.util.find_spec(f"{__package__}._cpu")
PATH = None if _FOUND is None else _FOUND.origin
"""Of the library, None if it is not built."""


@functools.cache
def library() -> ctypes.CDLL:
    # torch is imported, so its OpenMP is loaded, and the library shares it (same soname): one pool of threads
    return ctypes.CDLL(PATH)


class Map(ctypes.Structure):
    """A tensor (batch, channel, time) with its strides in elements; `repeat` channels of a scan share each channel."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("time", ctypes.c_int64),
        ("repeat", ctypes.c_int64),
    ]


def as_map(x: Tensor | None, channels: int) -> Map:
    if x is None:
        return Map(None, 0, 0, 0, 1)
    return Map(x.data_ptr(), *x.stride(), max(channels // x.shape[1], 1))


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def as_float(x: Tensor | None) -> Tensor | None:
    """float32, strides kept: the library computes in float32 only."""
    return None if x is None else x.to(torch.float32)
