"""What Python and the compiled libraries agree on: csrc/buffers.h, csrc/cpu/interface.h and csrc/cuda/interface.cuh.

`AGREED` is what a library has to say of itself when it is loaded (_native.py). Whoever changes the order or the meaning
of a field, which the sizes do not show, raises VERSION on both sides.

Shapes: B batch, D channels, L length, N state, G groups, K routes.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

MAX_STATE = 256
"""N, of all scans and implementations."""

DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4, torch.int32: 5}
"""Of the numbers in a tensor; 0 is no tensor."""


def dtype_code(x: Tensor) -> int:
    if x.dtype not in DTYPES:
        raise TypeError(f"the compiled libraries take {', '.join(map(str, DTYPES))}, not {x.dtype}")
    return DTYPES[x.dtype]


def _fields(of: type, *names: str) -> list[tuple[str, type]]:
    return [(name, of) for name in names]


class Buffer(ctypes.Structure):
    """A contiguous tensor, or nothing."""

    _fields_ = [("data", c_void_p), *_fields(c_int64, "count", "dtype")]

    @classmethod
    def of(cls, x: Tensor | None) -> Buffer:
        if x is None:
            return cls()
        if not x.is_contiguous():
            raise ValueError(f"the compiled libraries take {tuple(x.shape)} contiguous here, not strides {x.stride()}")
        return cls(x.data_ptr(), x.numel(), dtype_code(x))


# ---- csrc/cpu -------------------------------------------------------------------------------------------------------

CPU_VERSION = 4
BLOCK = 16
"""Channels side by side."""
CPU_CHUNK = 64
"""Tokens between two saved states."""
TILE_TOKENS = 64
"""Of a tile of non-causal SSD, at most."""
MAX_MAPS = 4
"""Of an image scan."""


class Map(ctypes.Structure):
    """(B, Dd, L) of any strides; `repeat` channels of a scan share each channel."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int64),
        ("size", c_int64 * 3),
        *_fields(c_int64, "batch", "channel", "time", "repeat"),
    ]

    @classmethod
    def of(cls, x: Tensor | None, channels: int) -> Map:
        if x is None:
            return cls(repeat=1)
        return cls(x.data_ptr(), dtype_code(x), tuple(x.shape), *x.stride(), max(channels // x.shape[1], 1))


class StateMap(ctypes.Structure):
    """(B, G, N, L) of any strides."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int64),
        ("size", c_int64 * 4),
        *_fields(c_int64, "batch", "group", "state", "time"),
    ]

    @classmethod
    def of(cls, x: Tensor) -> StateMap:
        return cls(x.data_ptr(), dtype_code(x), tuple(x.shape), *x.stride())


class Rows(ctypes.Structure):
    """(B, L, H, P) of any strides but the last, which is 1."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int64),
        ("size", c_int64 * 4),
        *_fields(c_int64, "batch", "token", "head"),
    ]

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(x.data_ptr(), dtype_code(x), tuple(x.shape), *x.stride()[:-1])


class ScanArguments(ctypes.Structure):
    _fields_ = [
        *_fields(Map, "u", "delta", "z", "dout"),
        *_fields(StateMap, "B", "C"),
        *_fields(Buffer, "A", "D", "bias"),
        *_fields(Buffer, "out", "last", "states", "du", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC"),
        *_fields(c_int64, "batch", "dim", "length", "state", "groups", "parts"),
        *_fields(c_int32, "softplus", "threads"),
    ]


class ConvArguments(ctypes.Structure):
    _fields_ = [
        *_fields(Map, "x", "dout"),
        *_fields(Buffer, "weight", "bias", "out", "dx", "dweight", "dbias"),
        *_fields(c_int64, "batch", "dim", "length", "taps"),
        *_fields(c_int32, "silu", "reverse", "channels_last", "threads"),
    ]


class DepthwiseArguments(ctypes.Structure):
    _fields_ = [
        ("x", Rows),
        *_fields(Buffer, "weight", "bias", "out"),
        *_fields(c_int64, "batch", "height", "width", "dim"),
        *_fields(c_int32, "silu", "threads"),
    ]


class GateArguments(ctypes.Structure):
    _fields_ = [
        *_fields(Buffer, "y", "out", "dout", "dy", "dz"),
        ("z", c_void_p),
        *_fields(c_int64, "z_dtype", "z_row", "rows", "dim"),
        ("scale", ctypes.c_float),
        ("threads", c_int32),
    ]


class NormArguments(ctypes.Structure):
    _fields_ = [
        *_fields(Buffer, "x", "branch", "sum", "out", "weight", "bias"),
        *_fields(c_int64, "rows", "dim"),
        ("eps", ctypes.c_float),
        *_fields(c_int32, "rms", "threads"),
    ]


class CrossArguments(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "map", "routes"),
        *_fields(c_int64, "map_dtype", "map_batch", "map_route"),
        ("map_stride", c_int64 * 3),
        *_fields(c_int64, "routes_dtype", "route_batch", "route_route", "route_channel", "route_place", "batch"),
        ("size", c_int64 * 3),
        ("map_routes", c_int64),
        ("routes_size", c_int64 * 4),
        *_fields(c_int32, "map_last", "routes_last", "columns", "backwards", "one_by_one", "threads"),
    ]


class Ss2dArguments(ctypes.Structure):
    _fields_ = [
        ("x", Buffer * MAX_MAPS),
        *_fields(Buffer, "dy", "proj", "dt_weight", "A", "D", "bias", "order", "y"),
        ("dx", Buffer * MAX_MAPS),
        *_fields(Buffer, "states", "dproj", "ddt_weight", "dA", "dD", "dbias"),
        *_fields(c_int64, "batch", "dim", "length", "state", "rank", "parts", "routes"),
        ("threads", c_int32),
    ]


class NcSsdArguments(ctypes.Structure):
    _fields_ = [
        *_fields(Rows, "x", "B", "C", "dy"),
        ("dt", Map),
        *_fields(Buffer, "A", "D", "bias", "sums", "turned", "state", "out", "dx", "dB", "dC", "ddt", "dA", "dD"),
        *_fields(c_int64, "batch", "length", "heads", "channels", "groups", "state_size", "parts", "tiles"),
        *_fields(c_int32, "softplus", "positive", "threads"),
    ]


# ---- csrc/cuda ------------------------------------------------------------------------------------------------------

CUDA_VERSION = 3
RUN = 8
"""Tokens of a lane."""
CUDA_CHUNK = 64
"""Tokens between two saved states."""
FORWARD_THREADS, BACKWARD_THREADS, GATED_THREADS = 256, 256, 128
"""Of a block, at most."""
FORWARD_ROWS, BACKWARD_ROWS, SUMS = 2, 4, 512
"""Shared memory of a warp: rows of N numbers per channel, and (backward, twice) numbers of sums."""
SHARED_BYTES = 48 * 1024
"""Of a block, at most: what it gets without asking."""


class CudaMap(ctypes.Structure):
    """(B, Dd, L), contiguous along time."""

    _fields_ = [("data", c_void_p), ("dtype", c_int64), ("size", c_int64 * 3), *_fields(c_int64, "batch", "channel")]

    @classmethod
    def of(cls, x: Tensor | None) -> CudaMap:
        return cls() if x is None else cls(x.data_ptr(), dtype_code(x), tuple(x.shape), *x.stride()[:-1])


class CudaStateMap(ctypes.Structure):
    """(B, G, N, L), contiguous along time."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int64),
        ("size", c_int64 * 4),
        *_fields(c_int64, "batch", "group", "state"),
    ]

    @classmethod
    def of(cls, x: Tensor) -> CudaStateMap:
        return cls(x.data_ptr(), dtype_code(x), tuple(x.shape), *x.stride()[:-1])


class CudaScanArguments(ctypes.Structure):
    _fields_ = [
        *_fields(CudaMap, "u", "delta", "z", "dout"),
        *_fields(CudaStateMap, "B", "C"),
        *_fields(Buffer, "A", "D", "bias"),
        *_fields(Buffer, "out", "last", "states", "du", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC"),
        *_fields(c_int64, "batch", "dim", "length", "state", "groups", "repeat"),
        *_fields(c_int32, "softplus", "vector", "wide", "wide_delta", "lanes", "warps", "device"),
        ("stream", c_void_p),
    ]


# ---- what a library must say of itself ------------------------------------------------------------------------------

_SHARED = {"MAX_STATE": MAX_STATE, "Buffer": ctypes.sizeof(Buffer)}
_SHARED |= {str(dtype).removeprefix("torch.").upper(): code for dtype, code in DTYPES.items()}

_CPU_STRUCTURES = (
    *(Map, StateMap, Rows, ScanArguments, ConvArguments),
    *(DepthwiseArguments, GateArguments, NormArguments, CrossArguments, Ss2dArguments, NcSsdArguments),
)

AGREED = {
    "cpu": {"VERSION": CPU_VERSION, "BLOCK": BLOCK, "CHUNK": CPU_CHUNK, "TILE_TOKENS": TILE_TOKENS}
    | {"MAX_MAPS": MAX_MAPS}
    | _SHARED
    | {structure.__name__: ctypes.sizeof(structure) for structure in _CPU_STRUCTURES},
    "cuda": {"VERSION": CUDA_VERSION, "RUN": RUN, "CHUNK": CUDA_CHUNK, "SUMS": SUMS, "SHARED_BYTES": SHARED_BYTES}
    | {"FORWARD_ROWS": FORWARD_ROWS, "BACKWARD_ROWS": BACKWARD_ROWS}
    | {"FORWARD_THREADS": FORWARD_THREADS, "BACKWARD_THREADS": BACKWARD_THREADS, "GATED_THREADS": GATED_THREADS}
    | _SHARED
    | {
        structure.__name__.removeprefix("Cuda"): ctypes.sizeof(structure)
        for structure in (CudaMap, CudaStateMap, CudaScanArguments)
    },
}
"""Numbers by name, of each library; a structure's is its size in bytes."""
