"""Cross scan and cross merge by the compiled CPU library (csrc/cpu/cross_scan.cpp), in any dtype without conversion.

Shapes: B batch, C channels, H W map, L = H*W, K = 4 routes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._common import route_bits
from ..._interface import CrossArguments, dtype_code
from ..._native import call


def scan(x, in_channel_first: bool, out_channel_first: bool, one_by_one: bool, scans: str) -> Tensor:
    """(B, [4,] C, H, W) or (B, H, W, [4,] C) -> (B, 4, C, L) or (B, L, 4, C)."""
    x = _as_map(x, in_channel_first, one_by_one)
    if _channels_last(x) is None:
        x = x.contiguous()
    batch, _, channels, height, width = x.shape
    length = height * width
    shape = (batch, 4, channels, length) if out_channel_first else (batch, length, 4, channels)
    y = x.new_empty(shape, dtype=x.dtype)
    _run("cross_scan", x, _as_routes(y, out_channel_first), one_by_one, scans)
    return y


def merge(y, in_channel_first: bool, out_channel_first: bool, one_by_one: bool, scans: str) -> Tensor:
    """(B, 4, C, H, W) or (B, H, W, 4, C) -> (B, [4,] C, L) or (B, L, [4,] C); the sum is formed in at least float32."""
    batch, height, width = y.shape[0], *(y.shape[3:] if out_channel_first else y.shape[1:3])
    channels, routes = y.shape[2 if out_channel_first else 4], (4,) if one_by_one else ()
    length = height * width
    y = _as_routes(y.flatten(3) if out_channel_first else y.flatten(1, 2), out_channel_first)
    if _channels_last(y.unsqueeze(3)) is None:
        y = y.contiguous()
    shape = (batch, *routes, channels, length) if in_channel_first else (batch, length, *routes, channels)
    x = y.new_empty(shape, dtype=y.dtype)
    image = x.unflatten(-1 if in_channel_first else 1, (height, width))
    function = "cross_unscan" if one_by_one else "cross_merge"
    _run(function, _as_map(image, in_channel_first, one_by_one), y, one_by_one, scans)
    return x


def _as_map(x: Tensor, channel_first: bool, one_by_one: bool) -> Tensor:
    """A view (B, 4 or 1, C, H, W)."""
    if not channel_first:
        x = x.permute(0, 3, 4, 1, 2) if one_by_one else x.permute(0, 3, 1, 2)
    return x if one_by_one else x.unsqueeze(1)


def _as_routes(y: Tensor, channel_first: bool) -> Tensor:
    """A view (B, 4, C, L)."""
    return y if channel_first else y.permute(0, 2, 3, 1)


def _strides(x: Tensor) -> list[int]:
    """In elements; 1 where the size is 1, as PyTorch leaves any number there."""
    return [1 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]


def _channels_last(x: Tensor) -> bool | None:
    """Whether the channels of x (B, K, C, H, W) are contiguous (True) or its rows (False); None if neither."""
    _, _, channel, _, column = _strides(x)
    if channel == 1 and (x.shape[2] > 1 or column != 1):
        return True
    return False if column == 1 else None


def _run(function: str, x: Tensor, y: Tensor, one_by_one: bool, scans: str) -> None:
    """x (B, K, C, H, W) and y (B, 4, C, L), each with contiguous channels or pixels."""
    if x.numel() == 0:
        return
    columns, backwards = route_bits(scans)
    map_batch, map_route, *map_stride = _strides(x)
    arguments = CrossArguments(
        map=x.data_ptr(),
        routes=y.data_ptr(),
        map_dtype=dtype_code(x),
        map_batch=map_batch,
        map_route=map_route,
        map_stride=tuple(map_stride),
        routes_dtype=dtype_code(y),
        **dict(zip(("route_batch", "route_route", "route_channel", "route_place"), _strides(y), strict=True)),
        batch=x.shape[0],
        size=tuple(x.shape[2:]),
        map_routes=x.shape[1],
        routes_size=tuple(y.shape),
        map_last=_channels_last(x),
        routes_last=_channels_last(y.unsqueeze(3)),
        columns=columns,
        backwards=backwards,
        one_by_one=one_by_one,
        threads=torch.get_num_threads(),
    )
    call("cpu", function, arguments)
