"""Causal convolution in Triton: one kernel convolves, one makes the gradient before the activation and its sums.

A tile is loaded once per tap, shifted; all but the first load of a line come from the first-level cache. The gradient
of x is the same convolution in the other direction, over what the second kernel leaves (over dy itself without an
activation). The gradients of weight and bias leave as one partial per tile and are added by torch in a fixed order. So
the same call gives the same bits.

Shapes: B batch, D channels, L length, K taps; of a program: BD channels, BT tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E

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
def seen(p_x, o_t, m_d, L, k: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr):
    """What tap k sees: x_{t-(K-1)+k}, or x_{t+(K-1)-k} with REVERSE; zero outside of 0..L-1. (BD, BT) in float32"""
    o_seen = o_t + (K - 1 - k) if REVERSE else o_t - (K - 1 - k)
    return tl.load(p_x + o_seen, mask=m_d & (o_seen >= 0) & (o_seen < L), other=0.0).to(tl.float32)


@triton.jit
def convolve(p_x, weight, bias, o_d, o_t, m_d, L, K: tl.constexpr, REVERSE: tl.constexpr):
    """bias + sum_k weight_k x_k: (BD, BT)"""
    b_y = tl.zeros((o_d.shape[0], o_t.shape[1]), tl.float32)
    for k in tl.static_range(K):
        b_weight = tl.load(weight + o_d * K + k, mask=m_d, other=0.0).to(tl.float32)
        b_y += b_weight * seen(p_x, o_t, m_d, L, k, K, REVERSE)
    if bias is not None:
        b_y += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_y


@triton.jit
def sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp2(-b_x * LOG2E))


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["x_b", "x_d", "D", "L", "n_tiles"])
def causal_conv1d_kernel(
    x,  # (B, D, L)
    weight,  # (D, K)
    bias,  # (D,) or None
    out,  # (B, D, L)
    x_b,
    x_d,
    D,
    L,
    n_tiles,
    K: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    i_b, _, o_d, o_t = place(D, n_tiles, BD, BT)
    m_d = o_d < D
    p_x = x + i_b * x_b + o_d * x_d.to(tl.int64)
    b_y = convolve(p_x, weight, bias, o_d, o_t, m_d, L, K, REVERSE)
    if SILU:
        b_y *= sigmoid(b_y)
    tl.store(out + (i_b * D + o_d) * L + o_t, b_y.to(out.dtype.element_ty), mask=m_d & (o_t < L))


@triton.jit(do_not_specialize=["x_b", "x_d", "dout_b", "dout_d", "D", "L", "n_tiles"])
def causal_conv1d_grad_kernel(
    dout,  # (B, D, L)
    x,  # (B, D, L)
    weight,  # (D, K)
    bias,  # (D,) or None
    dy,  # (B, D, L), the gradient before the activation; None without one
    d_weight,  # (B, n_tiles, D, K)
    d_bias,  # (B, n_tiles, D) or None
    dout_b,
    dout_d,
    x_b,
    x_d,
    D,
    L,
    n_tiles,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    i_b, i_t, o_d, o_t = place(D, n_tiles, BD, BT)
    m_d = o_d < D
    m_tile = m_d & (o_t < L)
    p_x = x + i_b * x_b + o_d * x_d.to(tl.int64)
    b_dy = tl.load(dout + i_b * dout_b + o_d * dout_d.to(tl.int64) + o_t, mask=m_tile, other=0.0).to(tl.float32)
    if dy is not None:
        b_y = convolve(p_x, weight, bias, o_d, o_t, m_d, L, K, REVERSE)
        b_gate = sigmoid(b_y)
        b_dy *= b_gate * (1.0 + b_y * (1.0 - b_gate))
        tl.store(dy + (i_b * D + o_d) * L + o_t, b_dy, mask=m_tile)
    o_part = (i_b * n_tiles + i_t) * D + o_d
    for k in tl.static_range(K):
        b_sum = tl.sum(b_dy * seen(p_x, o_t, m_d, L, k, K, REVERSE), 1, keep_dims=True)
        tl.store(d_weight + o_part * K + k, b_sum, mask=m_d)
    if bias is not None:
        tl.store(d_bias + o_part, tl.sum(b_dy, 1, keep_dims=True), mask=m_d)


# ---- launchers ------------------------------------------------------------------------------------------------------

TILE = 2048
"""Numbers of a program."""


def forward(x, weight, bias, silu: bool, reverse: bool) -> Tensor:
    """(B, D, L)"""
    return _convolve(x, weight, bias, x.dtype, silu, reverse)


def backward(dout, x, weight, bias, silu: bool, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias); an absent one as a tensor without elements."""
    dout, x, weight = _time_contiguous(dout), _time_contiguous(x), weight.contiguous()
    batch, dim, length = x.shape
    n_programs, n_tiles, blocks = _plan(x)
    dy = x.new_empty(x.shape, dtype=torch.float32) if silu else None
    d_weight = x.new_empty((batch, n_tiles, *weight.shape), dtype=torch.float32)
    d_bias = None if bias is None else x.new_empty((batch, n_tiles, dim), dtype=torch.float32)
    with torch.cuda.device_of(x):
        causal_conv1d_grad_kernel[(n_programs,)](
            *(dout, x, weight, None if bias is None else bias.contiguous(), dy, d_weight, d_bias),
            *(*dout.stride()[:2], *x.stride()[:2], dim, length, n_tiles),
            K=weight.shape[1],
            REVERSE=reverse,
            **blocks,
        )
    return (
        _convolve(dy if silu else dout, weight, None, x.dtype, False, not reverse),
        d_weight.sum((0, 1)).to(weight.dtype),
        x.new_empty(0) if bias is None else d_bias.sum((0, 1)).to(bias.dtype),
    )


def _convolve(x, weight, bias, dtype: torch.dtype, silu: bool, reverse: bool) -> Tensor:
    """(B, D, L) in `dtype`"""
    x = _time_contiguous(x)
    out = x.new_empty(x.shape, dtype=dtype)
    n_programs, n_tiles, blocks = _plan(x)
    with torch.cuda.device_of(x):
        causal_conv1d_kernel[(n_programs,)](
            *(x, weight.contiguous(), None if bias is None else bias.contiguous(), out),
            *(*x.stride()[:2], *x.shape[1:], n_tiles),
            K=weight.shape[1],
            SILU=silu,
            REVERSE=reverse,
            **blocks,
        )
    return out


def _time_contiguous(x: Tensor) -> Tensor:
    """x with stride 1 along time; its other strides stay."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _plan(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Programs, tiles of a sample, and block sizes. They know the length only as one of a few powers of 2."""
    batch, dim, length = x.shape
    tokens = min(256, max(32, triton.next_power_of_2(length)))
    n_tiles = triton.cdiv(length, tokens)
    blocks = {"BD": TILE // tokens, "BT": tokens, "num_warps": 4}
    return batch * triton.cdiv(dim, blocks["BD"]) * n_tiles, n_tiles, blocks
