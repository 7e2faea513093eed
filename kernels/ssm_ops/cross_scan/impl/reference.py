"""Cross scan and cross merge in plain PyTorch: differentiable, on any device and dtype.

A map is turned into (..., C, H, W), walked along its routes, and turned into the wanted layout at the end.
Shapes: B batch, C channels, H W map, L = H*W, K = 4 routes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._common import ROUTES, walk


def _unwalk(y: Tensor, size: tuple[int, int], columns: bool, backwards: bool) -> Tensor:
    """(B, C, L) in the order of the route -> (B, C, L) in row-major order: the inverse of `walk`."""
    y = y.flip(2) if backwards else y
    return y.unflatten(2, (size[1], size[0])).transpose(2, 3).flatten(2) if columns else y


def scan(x, in_channel_first: bool, out_channel_first: bool, one_by_one: bool, scans: str) -> Tensor:
    """(B, [4,] C, H, W) or (B, H, W, [4,] C) -> (B, 4, C, L) or (B, L, 4, C)."""
    if not in_channel_first:
        x = x.permute(0, 3, 4, 1, 2) if one_by_one else x.permute(0, 3, 1, 2)
    maps = x.unbind(1) if one_by_one else [x] * 4
    routes = torch.stack([walk(m, *route) for m, route in zip(maps, ROUTES[scans], strict=True)], 1)
    return routes if out_channel_first else routes.permute(0, 3, 1, 2).contiguous()


def merge(y, in_channel_first: bool, out_channel_first: bool, one_by_one: bool, scans: str) -> Tensor:
    """(B, 4, C, H, W) or (B, H, W, 4, C) -> (B, [4,] C, L) or (B, L, [4,] C); the sum is formed in at least float32."""
    if not out_channel_first:
        y = y.permute(0, 3, 4, 1, 2)
    size = y.shape[3:]
    routes = [_unwalk(r, size, *route) for r, route in zip(y.flatten(3).unbind(1), ROUTES[scans], strict=True)]
    if one_by_one:
        merged = torch.stack(routes, 1)  # (B, 4, C, L)
        return merged if in_channel_first else merged.permute(0, 3, 1, 2).contiguous()
    if y.dtype in (torch.float16, torch.bfloat16):
        routes = [r.float() for r in routes]
    merged = ((routes[0] + routes[2]) + (routes[1] + routes[3])).to(y.dtype)
    return (merged if in_channel_first else merged.transpose(1, 2)).contiguous()
