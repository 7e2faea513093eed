"""The compiled libraries: plain C interfaces (csrc/cpu, csrc/cuda), called through ctypes, so they fit every torch."""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor


def _find(name: str) -> str | None:
    found = importlib.util.find_spec(f"{__package__}._{name}")
    return None if found is None else found.origin


PATHS = {"cpu": _find("cpu"), "cuda": _find("cuda")}
"""Of the libraries, None where one is not built."""


@functools.cache
def library(name: str = "cpu") -> ctypes.CDLL:
    # torch is imported, so its OpenMP is loaded, and the CPU library shares it (same soname): one pool of threads
    loaded = ctypes.CDLL(PATHS[name])
    if name == "cuda":  # its functions return None or what went wrong
        for direction in ("forward", "backward"):
            for dtype in ("float32", "float16", "bfloat16"):
                getattr(loaded, f"selective_scan_{direction}_{dtype}").restype = ctypes.c_char_p
    return loaded


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
    return x if x is None or x.dtype == torch.float32 else x.float()  # a call that changes nothing takes a microsecond
