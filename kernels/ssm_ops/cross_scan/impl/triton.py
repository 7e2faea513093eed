"""Cross scan and cross merge in Triton: every number is read once and written once (by a scan four times).

A program moves a tile of BC channels and BH x BW pixels. On either side the tile is addressed with the axis innermost
that is contiguous there: channels where they come last, else pixels along a row or, for a route over the columns, along
a column. Between two such orders the tile is transposed on the chip, so that both sides are accessed coalesced.

Shapes: B batch, C channels, H W map, L = H*W, K = 4 routes. x is the map (or four of them), y the routes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import route_bits

# ---- one tile -------------------------------------------------------------------------------------------------------


@triton.jit
def multiples(numbers, VEC: tl.constexpr, TYPE: tl.constexpr):
    """The numbers, all multiples of VEC: the compiler learns it, and vectorises accesses."""
    known = ()
    for i in tl.static_range(len(numbers)):
        known = known + ((numbers[i] // VEC * VEC).to(TYPE),)
    return known


@triton.jit
def tile_of_program(C, H, W, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Sample, and channels (BC,), rows (BH,) and columns (BW,) of this program. Neighbours share their pixels."""
    n_c, n_h, n_w = tl.cdiv(C, BC), tl.cdiv(H, BH), tl.cdiv(W, BW)
    i = tl.program_id(0)
    o_c = i % n_c * BC + tl.arange(0, BC)
    o_w = i // n_c % n_w * BW + tl.arange(0, BW)
    o_h = i // n_c // n_w % n_h * BH + tl.arange(0, BH)
    return (i // n_c // n_w // n_h).to(tl.int64), (o_c, o_h, o_w)


@triton.jit
def in_order(tile, LAST: tl.constexpr, COLUMNS: tl.constexpr):
    """Indices in the order of memory: axes (h, w, c) with channels LAST, (c, w, h) along COLUMNS, else (c, h, w)."""
    o_c, o_h, o_w = tile
    if LAST:
        ordered = o_c[None, None, :], o_h[:, None, None], o_w[None, :, None]
    elif COLUMNS:
        ordered = o_c[:, None, None], o_h[None, None, :], o_w[None, :, None]
    else:
        ordered = o_c[:, None, None], o_h[None, :, None], o_w[None, None, :]
    return ordered


@triton.jit
def to_order(b_x, LAST: tl.constexpr, COLUMNS: tl.constexpr):
    """(c, h, w) -> the order of memory"""
    if LAST:
        b_x = tl.permute(b_x, (1, 2, 0))
    elif COLUMNS:
        b_x = tl.permute(b_x, (0, 2, 1))
    return b_x


@triton.jit
def from_order(b_x, LAST: tl.constexpr, COLUMNS: tl.constexpr):
    """The order of memory -> (c, h, w)"""
    if LAST:
        b_x = tl.permute(b_x, (2, 0, 1))
    elif COLUMNS:
        b_x = tl.permute(b_x, (0, 2, 1))
    return b_x


@triton.jit
def on_map(x, i_b, k, tile, size, stride, LAST: tl.constexpr):
    """Pointers to a tile of map k, and mask, in the order of memory."""
    o_c, o_h, o_w = in_order(tile, LAST, False)
    x_b, x_k, x_c, x_h, x_w = stride
    p_pixel = x + i_b * x_b + k * x_k + o_h * x_h
    p_x = p_pixel + o_w * x_w + o_c if LAST else p_pixel + o_c * x_c + o_w
    return p_x, (o_c < size[0]) & (o_h < size[1]) & (o_w < size[2])


@triton.jit
def on_route(y, i_b, k, tile, size, stride, LAST: tl.constexpr, COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr):
    """Pointers to the same tile on route k, and mask, in the order of memory."""
    o_c, o_h, o_w = in_order(tile, LAST, COLUMNS)
    C, H, W = size
    y_b, y_k, y_c, y_l = stride
    o_l = o_w * H + o_h if COLUMNS else o_h * W + o_w
    if BACKWARDS:
        o_l = H * W - 1 - o_l
    p_route = y + i_b * y_b + k * y_k
    p_y = p_route + o_l * y_l + o_c if LAST else p_route + o_c * y_c + o_l
    return p_y, (o_c < C) & (o_h < H) & (o_w < W)


# ---- kernels --------------------------------------------------------------------------------------------------------

NUMBERS = ["x_b", "x_k", "x_c", "x_h", "x_w", "y_b", "y_k", "y_c", "y_l", "C", "H", "W"]


@triton.jit(do_not_specialize=NUMBERS)
def cross_scan_kernel(
    x,
    y,
    x_b,
    x_k,
    x_c,
    x_h,
    x_w,
    y_b,
    y_k,
    y_c,
    y_l,
    C,
    H,
    W,
    ONE_BY_ONE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARDS: tl.constexpr,
    X_LAST: tl.constexpr,  # channels are contiguous in x, else rows are; likewise y
    Y_LAST: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    X_VEC: tl.constexpr,  # divides the strides of x but that of 1; likewise y
    Y_VEC: tl.constexpr,
    C_VEC: tl.constexpr,  # divides C
    L_VEC: tl.constexpr,  # divides H and W
):
    x_stride = multiples((x_b, x_k, x_c, x_h, x_w), X_VEC, tl.int64)
    y_stride = multiples((y_b, y_k, y_c, y_l), Y_VEC, tl.int64)
    size = multiples((C,), C_VEC, tl.int32) + multiples((H, W), L_VEC, tl.int32)
    i_b, tile = tile_of_program(C, H, W, BC, BH, BW)
    for k in tl.static_range(4):
        if ONE_BY_ONE or k == 0:
            p_x, m_x = on_map(x, i_b, k, tile, size, x_stride, X_LAST)
            b_x = from_order(tl.load(p_x, mask=m_x), X_LAST, False)
        p_y, m_y = on_route(y, i_b, k, tile, size, y_stride, Y_LAST, COLUMNS >> k & 1, BACKWARDS >> k & 1)
        tl.store(p_y, to_order(b_x, Y_LAST, COLUMNS >> k & 1), mask=m_y)


@triton.jit(do_not_specialize=NUMBERS)
def cross_merge_kernel(
    x,
    y,
    x_b,
    x_k,
    x_c,
    x_h,
    x_w,
    y_b,
    y_k,
    y_c,
    y_l,
    C,
    H,
    W,
    ONE_BY_ONE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARDS: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    C_VEC: tl.constexpr,
    L_VEC: tl.constexpr,
):
    x_stride = multiples((x_b, x_k, x_c, x_h, x_w), X_VEC, tl.int64)
    y_stride = multiples((y_b, y_k, y_c, y_l), Y_VEC, tl.int64)
    size = multiples((C,), C_VEC, tl.int32) + multiples((H, W), L_VEC, tl.int32)
    i_b, tile = tile_of_program(C, H, W, BC, BH, BW)
    if ONE_BY_ONE:
        for k in tl.static_range(4):
            p_y, m_y = on_route(y, i_b, k, tile, size, y_stride, Y_LAST, COLUMNS >> k & 1, BACKWARDS >> k & 1)
            b_x = from_order(tl.load(p_y, mask=m_y), Y_LAST, COLUMNS >> k & 1)
            p_x, m_x = on_map(x, i_b, k, tile, size, x_stride, X_LAST)
            tl.store(p_x, to_order(b_x, X_LAST, False), mask=m_x)
    else:
        ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
        b_sum = tl.zeros((BC, BH, BW), ACC)
        for k in tl.static_range(2):
            # routes k and k + 2 both walk the rows or both the columns: one transposition for the two
            p_y, m_y = on_route(y, i_b, k, tile, size, y_stride, Y_LAST, COLUMNS >> k & 1, BACKWARDS >> k & 1)
            b_pair = tl.load(p_y, mask=m_y).to(ACC)
            p_y, _ = on_route(y, i_b, k + 2, tile, size, y_stride, Y_LAST, COLUMNS >> k & 1, BACKWARDS >> (k + 2) & 1)
            b_pair += tl.load(p_y, mask=m_y).to(ACC)
            b_sum += from_order(b_pair, Y_LAST, COLUMNS >> k & 1)
        p_x, m_x = on_map(x, i_b, 0, tile, size, x_stride, X_LAST)
        tl.store(p_x, to_order(b_sum, X_LAST, False).to(x.dtype.element_ty), mask=m_x)


# ---- launchers ------------------------------------------------------------------------------------------------------


def scan(x, in_channel_first: bool, out_channel_first: bool, one_by_one: bool, scans: str) -> Tensor:
    """(B, [4,] C, H, W) or (B, H, W, [4,] C) -> (B, 4, C, L) or (B, L, 4, C)."""
    x = _as_map(x, in_channel_first, one_by_one)
    if _channels_last(x) is None:
        x = x.contiguous()
    batch, _, channels, height, width = x.shape
    length = height * width
    shape = (batch, 4, channels, length) if out_channel_first else (batch, length, 4, channels)
    y = x.new_empty(shape, dtype=x.dtype)
    _launch(cross_scan_kernel, x, _as_routes(y, out_channel_first), one_by_one, scans)
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
    _launch(cross_merge_kernel, _as_map(image, in_channel_first, one_by_one), y, one_by_one, scans)
    return x


def _as_map(x: Tensor, channel_first: bool, one_by_one: bool) -> Tensor:
    """A view (B, 4 or 1, C, H, W)."""
    if not channel_first:
        x = x.permute(0, 3, 4, 1, 2) if one_by_one else x.permute(0, 3, 1, 2)
    return x if one_by_one else x.unsqueeze(1)


def _as_routes(y: Tensor, channel_first: bool) -> Tensor:
    """A view (B, 4, C, L)."""
    return y if channel_first else y.permute(0, 2, 3, 1)


def _channels_last(x: Tensor) -> bool | None:
    """Whether the channels of x (B, K, C, H, W) are contiguous (True) or its rows (False); None if neither."""
    if x.stride(2) == 1 and (x.shape[2] > 1 or x.stride(4) != 1):
        return True
    return False if x.stride(4) == 1 or x.shape[4] == 1 else None


def _outer_strides(x: Tensor, contiguous: int) -> list[int]:
    """The strides that an address depends on, but for that of dimension `contiguous`, which is 1."""
    return [s for i, (s, n) in enumerate(zip(x.stride(), x.shape, strict=True)) if i != contiguous and n > 1]


def _launch(kernel, x: Tensor, y: Tensor, one_by_one: bool, scans: str) -> None:
    """x (B, K, C, H, W) and y (B, 4, C, L), each with contiguous channels or pixels."""
    batch, _, channels, height, width = x.shape
    x_last, y_last = _channels_last(x), _channels_last(y.unsqueeze(3))
    columns, backwards = route_bits(scans)
    block = _blocks(channels, height, width, x_last, y_last)
    n_programs = batch * math.prod(triton.cdiv(n, b) for n, b in zip(x.shape[2:], block, strict=True))
    widest = 16 // x.element_size()
    with torch.cuda.device_of(x):
        kernel[(n_programs,)](
            *(x, y, *x.stride(), *y.stride(), channels, height, width),
            ONE_BY_ONE=one_by_one,
            COLUMNS=columns,
            BACKWARDS=backwards,
            X_LAST=x_last,
            Y_LAST=y_last,
            **dict(zip(("BC", "BH", "BW"), block, strict=True)),
            X_VEC=math.gcd(widest, *_outer_strides(x, 2 if x_last else 4)),
            Y_VEC=math.gcd(widest, *_outer_strides(y, 2 if y_last else 3)),
            C_VEC=math.gcd(widest, channels),
            L_VEC=math.gcd(widest, height, width),
            num_warps=min(4, max(1, math.prod(block) // 1024)),
        )


def _blocks(channels: int, height: int, width: int, x_last: bool, y_last: bool) -> tuple[int, int, int]:
    """BC, BH, BW: 4096 numbers, of which those contiguous in memory fill whole sectors on either side."""
    c, h, w = (triton.next_power_of_2(max(n, 1)) for n in (channels, height, width))
    if x_last and y_last:
        bc = min(c, max(32, min(128, channels & -channels)))  # a divisor where there is a good one
        bw = min(w, 32)
        return bc, min(h, max(1, 4096 // bc // bw)), bw
    if y_last:
        bw = min(w, 64)
        bh = min(h, 128 // bw)
    else:  # routes over rows and routes over columns are contiguous in turn
        bh, bw = (min(n, 16 if x_last else 64) for n in (h, w))
    return min(c, 4096 // (bh * bw)), bh, bw
