"""Causal convolution in Triton: one kernel convolves, one makes the gradient before the activation and its sums.

A tile is loaded once per tap, shifted; all but the first load of a line come from the first-level cache. The gradient
of x is the same convolution in the other direction, over what the second kernel leaves (over dy itself without an
activation). The gradients of weight and bias leave as one partial per tile and are added by torch in a fixed order. So
the same call gives the same bits.

Tensors are read and written as they lie in memory, (B, D, L) or, with LAST, (B, L, D): nothing is transposed.

Shapes: B batch, D channels, L length, K taps; of a program: BD channels, BT tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E
from ..api import is_channels_last

# ---- one tile -------------------------------------------------------------------------------------------------------


@triton.jit
def place(D, n_tiles, BD: tl.constexpr, BT: tl.constexpr):
    """(sample, tile, its channels (BD, 1) and tokens (1, BT)) of this program."""
    i = tl.program_id(0)
    n_blocks = tl.cdiv(D, BD)
    o_d = i // n_tiles % n_blocks * BD + tl.arange(0, BD)
    o_t = i % n_tiles * BT + tl.arange(0, BT)
    return (i // n_tiles // n_blocks).to(tl.int64), i % n_tiles, o_d[:, None], o_t[None, :]


@triton.jit
def offsets(o_d, o_t, stride, LAST: tl.constexpr):
    """Of channels and tokens; `stride` is that of the ones that do not lie side by side."""
    stride = stride.to(tl.int64)
    return o_d + o_t * stride if LAST else o_d * stride + o_t


@triton.jit
def seen(p_x, stride, o_d, o_t, m_d, L, k: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, LAST: tl.constexpr):
    """What tap k sees: x_{t-(K-1)+k}, or x_{t+(K-1)-k} with REVERSE; zero outside of 0..L-1. (BD, BT) in float32"""
    o_seen = o_t + (K - 1 - k) if REVERSE else o_t - (K - 1 - k)
    m_seen = m_d & (o_seen >= 0) & (o_seen < L)
    return tl.load(p_x + offsets(o_d, o_seen, stride, LAST), mask=m_seen, other=0.0).to(tl.float32)


@triton.jit
def convolve(p_x, stride, weight, bias, o_d, o_t, m_d, L, K: tl.constexpr, REVERSE: tl.constexpr, LAST: tl.constexpr):
    """bias + sum_k weight_k x_k: (BD, BT)"""
    b_y = tl.zeros((o_d.shape[0], o_t.shape[1]), tl.float32)
    for k in tl.static_range(K):
        b_weight = tl.load(weight + o_d * K + k, mask=m_d, other=0.0).to(tl.float32)
        b_y += b_weight * seen(p_x, stride, o_d, o_t, m_d, L, k, K, REVERSE, LAST)
    if bias is not None:
        b_y += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_y


@triton.jit
def sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp2(-b_x * LOG2E))


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["x_b", "x_stride", "D", "L", "n_tiles"])
def causal_conv1d_kernel(
    x,  # (B, D, L), or (B, L, D) with LAST
    weight,  # (D, K)
    bias,  # (D,) or None
    out,  # as x, contiguous
    x_b,
    x_stride,
    D,
    L,
    n_tiles,
    K: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    LAST: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    i_b, _, o_d, o_t = place(D, n_tiles, BD, BT)
    m_d = o_d < D
    b_y = convolve(x + i_b * x_b, x_stride, weight, bias, o_d, o_t, m_d, L, K, REVERSE, LAST)
    if SILU:
        b_y *= sigmoid(b_y)
    p_out = out + i_b * D * L + offsets(o_d, o_t, D if LAST else L, LAST)
    tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m_d & (o_t < L))


@triton.jit(do_not_specialize=["x_b", "x_stride", "dout_b", "dout_stride", "D", "L", "n_tiles"])
def causal_conv1d_grad_kernel(
    dout,  # (B, D, L), or (B, L, D) with LAST
    x,  # likewise
    weight,  # (D, K)
    bias,  # (D,) or None
    dy,  # as x, contiguous: the gradient before the activation; None without one
    d_weight,  # (B, n_tiles, D, K)
    d_bias,  # (B, n_tiles, D) or None
    dout_b,
    dout_stride,
    x_b,
    x_stride,
    D,
    L,
    n_tiles,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
    LAST: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    i_b, i_t, o_d, o_t = place(D, n_tiles, BD, BT)
    m_d = o_d < D
    m_tile = m_d & (o_t < L)
    p_x = x + i_b * x_b
    p_dout = dout + i_b * dout_b + offsets(o_d, o_t, dout_stride, LAST)
    b_dy = tl.load(p_dout, mask=m_tile, other=0.0).to(tl.float32)
    if dy is not None:
        b_y = convolve(p_x, x_stride, weight, bias, o_d, o_t, m_d, L, K, REVERSE, LAST)
        b_gate = sigmoid(b_y)
        b_dy *= b_gate * (1.0 + b_y * (1.0 - b_gate))
        tl.store(dy + i_b * D * L + offsets(o_d, o_t, D if LAST else L, LAST), b_dy, mask=m_tile)
    o_part = (i_b * n_tiles + i_t) * D + o_d
    for k in tl.static_range(K):
        b_sum = tl.sum(b_dy * seen(p_x, x_stride, o_d, o_t, m_d, L, k, K, REVERSE, LAST), 1, keep_dims=True)
        tl.store(d_weight + o_part * K + k, b_sum, mask=m_d)
    if bias is not None:
        tl.store(d_bias + o_part, tl.sum(b_dy, 1, keep_dims=True), mask=m_d)


# ---- launchers ------------------------------------------------------------------------------------------------------

TILE = 2048
"""Numbers of a program."""


def forward(x, weight, bias, silu: bool, reverse: bool) -> Tensor:
    """(B, D, L), see `result_like`."""
    x = _dense_rows(x)
    return _convolve(x, weight, bias, x.dtype, silu, reverse, is_channels_last(x))


def backward(dout, x, weight, bias, silu: bool, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias); an absent one as a tensor without elements."""
    x, weight = _dense_rows(x), weight.contiguous()
    last = is_channels_last(x)
    dout = dout if dout.stride(1 if last else 2) == 1 else _memory_like(dout, last)
    batch, dim, length = x.shape
    n_programs, n_tiles, blocks = _plan(x, last)
    dy = _empty(x, torch.float32, last) if silu else None
    d_weight = x.new_empty((batch, n_tiles, *weight.shape), dtype=torch.float32)
    d_bias = None if bias is None else x.new_empty((batch, n_tiles, dim), dtype=torch.float32)
    with torch.cuda.device_of(x):
        causal_conv1d_grad_kernel[(n_programs,)](
            *(dout, x, weight, None if bias is None else bias.contiguous(), dy, d_weight, d_bias),
            *(*_strides(dout, last), *_strides(x, last), dim, length, n_tiles),
            K=weight.shape[1],
            REVERSE=reverse,
            LAST=last,
            **blocks,
        )
    return (
        _convolve(dy if silu else dout, weight, None, x.dtype, False, not reverse, last),
        d_weight.sum((0, 1)).to(weight.dtype),
        x.new_empty(0) if bias is None else d_bias.sum((0, 1)).to(bias.dtype),
    )


def _convolve(x, weight, bias, dtype: torch.dtype, silu: bool, reverse: bool, last: bool) -> Tensor:
    """(B, D, L) in `dtype`; in memory (B, L, D), as x, if `last`."""
    out = _empty(x, dtype, last)
    n_programs, n_tiles, blocks = _plan(x, last)
    with torch.cuda.device_of(x):
        causal_conv1d_kernel[(n_programs,)](
            *(x, weight.contiguous(), None if bias is None else bias.contiguous(), out),
            *(*_strides(x, last), *x.shape[1:], n_tiles),
            K=weight.shape[1],
            SILU=silu,
            REVERSE=reverse,
            LAST=last,
            **blocks,
        )
    return out


def _empty(like: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    return like.new_empty(like.mT.shape, dtype=dtype).mT if last else like.new_empty(like.shape, dtype=dtype)


def _dense_rows(x: Tensor) -> Tensor:
    """x with stride 1 along its channels or along time; its other strides stay."""
    return x if 1 in x.stride()[1:] else x.contiguous()


def _memory_like(x: Tensor, last: bool) -> Tensor:
    """The same numbers, contiguous as (B, L, D), or as (B, D, L)."""
    return x.mT.contiguous().mT if last else x.contiguous()


def _strides(x: Tensor, last: bool) -> tuple[int, int]:
    """Of the samples, and of what does not lie side by side."""
    return x.stride(0), x.stride(2 if last else 1)


def _plan(x: Tensor, last: bool) -> tuple[int, int, dict[str, int]]:
    """Programs, tiles of a sample, and block sizes. They know the length only as one of a few powers of 2."""
    batch, dim, length = x.shape
    # the longer side of a tile is the one whose numbers lie side by side
    tokens = 32 if last else min(256, max(32, triton.next_power_of_2(length)))
    n_tiles = triton.cdiv(length, tokens)
    blocks = {"BD": TILE // tokens, "BT": tokens, "num_warps": 8 if last else 4}
    return batch * triton.cdiv(dim, blocks["BD"]) * n_tiles, n_tiles, blocks
