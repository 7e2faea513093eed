"""SS2D's scan in Triton: four routes over one channels-last map. _triton_routes.py tells how, and the bytes.

With K = 4, M = 1 and one state, in half precision, the least are 4 + 8 F / D bytes per pixel and channel, up to 34 are
moved, against about 70 of the composition. Arithmetic weighs more: compiled for sm_90 the forward has about 100
instructions per pixel, channel and route, so that it is bound by them, not by memory.

Shapes: B batch, D channels, H W map, K = 4 routes, N state, R rank of the step sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _triton_routes as routes
from ..._common import route_bits


@triton.jit(do_not_specialize=["H", "W", "size", "columns", "backwards"])
def pixels_kernel(pixels, H, W, size, columns, backwards, BT: tl.constexpr):
    """pixels (K, size), size a multiple of BT: the pixel at every place of a route, that of the last one past its end.

    Bit k of columns and backwards: does route k walk the columns? does it walk backwards?
    """
    n_tiles = size // BT
    k = tl.program_id(0) // n_tiles
    o_t = tl.program_id(0) % n_tiles * BT + tl.arange(0, BT)
    o_l = tl.minimum(o_t, H * W - 1)
    o_l = tl.where((backwards >> k & 1) != 0, H * W - 1 - o_l, o_l)
    o_p = tl.where((columns >> k & 1) != 0, o_l % H * W + o_l // H, o_l)
    tl.store(pixels + k.to(tl.int64) * size + o_t, o_p)


def forward(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, keep_states) -> tuple[Tensor, Tensor]:
    """(out, states); shapes in api.py."""
    pixels = _pixels(x, scans)
    out, states = routes.forward([_tokens(x)], proj, dt_weight, A, D, dt_bias, pixels, out_dtype, keep_states)
    return _like(x, out), states


def backward(dout, x, proj, dt_weight, A, D, dt_bias, states, scans) -> tuple[Tensor, ...]:
    """Gradients of (x, proj, dt_weight, A, D, dt_bias)."""
    inputs = ([_tokens(x)], proj, dt_weight, A, D, dt_bias)
    (dx,), *rest = routes.backward(_tokens(dout), *inputs, _pixels(x, scans), states, "ss2d_scan")
    return _like(x, dx), *rest


def _tokens(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, L, D), contiguous"""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _pixels(x: Tensor, scans: str) -> Tensor:
    """(K, S BT) int32, see pixels_kernel."""
    (height, width), tile = x.shape[2:], routes.TILE
    n_tiles = triton.cdiv(height * width, tile)
    pixels = torch.empty((4, n_tiles * tile), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        pixels_kernel[(4 * n_tiles,)](pixels, height, width, n_tiles * tile, *route_bits(scans), BT=tile, num_warps=1)
    return pixels


def _like(x: Tensor, y: Tensor) -> Tensor:
    """(B, L, D) -> (B, D, H, W), with the strides of x if it is dense."""
    y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    strides = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == strides else torch.empty_like(x, dtype=y.dtype).copy_(y)
