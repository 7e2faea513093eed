"""One tile of the chunked SSD in Triton: its tokens, its part of a tensor or state, and the decays within it.

Shapes: of a program BT tokens of a tile, BP channels, BN states; P channels of a head, N state.
"""

from __future__ import annotations

import triton
import triton.language as tl

STRIDES = ["x_b", "x_l", "x_h", *(f"{x}_{dim}" for x in "BC" for dim in "blg")]
SIZES = ["L", "H", "E", "chunk", "parts", "n_tiles"]
"""Arguments of the kernels that are no constants of a compilation."""


@triton.jit
def split_program(SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(what else this program is, block of SIZE). Grids have one dimension, as the others end at 65535 programs."""
    n_blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    return tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks


@triton.jit
def tokens(i_t, L, chunk, parts, BT: tl.constexpr):
    """Tokens (BT,) of tile i_t, which is part i_t % parts of chunk i_t // parts, and mask. Past L a tile is empty."""
    i_chunk = i_t // parts
    o_t = i_chunk * chunk + i_t % parts * BT + tl.arange(0, BT)
    return o_t, (o_t < (i_chunk + 1) * chunk) & (o_t < L)


@triton.jit
def multiple(x, VEC: tl.constexpr):
    """x, which is a multiple of VEC, in 64 bits: the compiler learns it, and vectorises accesses."""
    return (x // VEC * VEC).to(tl.int64)


@triton.jit
def load_tile(x, o_t, m_t, stride_t, o_c, SIZE: tl.constexpr):
    """Tokens o_t and columns o_c < SIZE of x as float32, zeros elsewhere: (BT, columns)"""
    m_x = m_t[:, None] & (o_c < SIZE)[None, :]
    return tl.load(x + o_t[:, None] * stride_t + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def load_state(states, o_p, o_n, P: tl.constexpr, N: tl.constexpr):
    """A block of a state (P, N), zeros outside of it: (BP, BN)"""
    m_state = (o_p < P)[:, None] & (o_n < N)[None, :]
    return tl.load(states + o_p[:, None] * N + o_n[None, :], mask=m_state, other=0.0)


@triton.jit
def place_steps(steps, i_b, i_h, i_t, H, n_tiles, BT: tl.constexpr):
    """Where `ssd_step_kernel` put what it says of a tile: four rows of BT numbers."""
    return steps + ((i_b * H + i_h) * n_tiles + i_t) * 4 * BT


@triton.jit
def row(p_steps, r: tl.constexpr, BT: tl.constexpr):
    return tl.load(p_steps + r * BT + tl.arange(0, BT))


@triton.jit
def decay_from_start(p_steps, BT: tl.constexpr):
    """What every token still sees of the state before the tile: (BT,)"""
    return tl.exp2(row(p_steps, 1, BT))


@triton.jit
def decay_to_end(p_steps, BT: tl.constexpr):
    """What the state after the tile still sees of every token: (BT,)"""
    b_high = tl.load(p_steps + 2 * BT - 1) - row(p_steps, 1, BT)
    return tl.exp2(b_high + (tl.load(p_steps + 3 * BT - 1) - row(p_steps, 2, BT)))


@triton.jit
def decay_of_tile(p_steps, BT: tl.constexpr):
    return tl.exp2(tl.load(p_steps + 2 * BT - 1))


@triton.jit
def decays_between(p_steps, BT: tl.constexpr):
    """W[i, j] = exp(a_{j+1} + .. + a_i), what token i still sees of token j; 0 for i < j: (BT, BT)"""
    o_t = tl.arange(0, BT)
    b_high = row(p_steps, 1, BT)
    b_low = row(p_steps, 2, BT)
    b_log = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    return tl.exp2(tl.where(o_t[:, None] >= o_t[None, :], b_log, float("-inf")))
