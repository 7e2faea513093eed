"""Chunked SSD in Triton: one kernel along the states, and others over all tiles of tokens at once.

`ssd_state_kernel` walks a sample from tile to tile and leaves the state at every boundary; walking backwards over dy
and C it leaves the gradients of these states. With both at hand tiles know nothing of each other: `ssd_out_kernel`
makes y, `ssd_input_grad_kernel` the gradients of x and of the steps, and `ssd_projection_grad_kernel` those of B and C,
for which it goes through the heads of their group. A program writes only what it owns; what is left to add up (A, D and
dt_bias, one partial per tile) is added by torch in a fixed order. So the same call gives the same bits.

A tile is a chunk or a part of one. Those of the backward are smaller, as it holds more in registers, and it forms the
states between them again from those that were saved. The mathematics of a tile is that of reference.py.

Products are exact to float32. Two half-precision inputs go through the tensor cores as they are (tf32 holds float16 and
bfloat16 exactly); an operand with steps or decays in it is split, which makes three products of one ("tf32x3"); float32
inputs are multiplied in float32 ("ieee").

Shapes: B batch, L tokens, H heads, P channels of a head, N state, G groups, E = H / G heads of a group; of a program:
BT tokens of a tile, BP channels, BN states. Between tiles are the boundaries 0 (before the first) to n_tiles.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, step_size

# ---- one tile -------------------------------------------------------------------------------------------------------


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


# ---- kernels --------------------------------------------------------------------------------------------------------

STRIDES = ["x_b", "x_l", "x_h", *(f"{x}_{dim}" for x in "BC" for dim in "blg")]
SIZES = ["L", "H", "E", "chunk", "parts", "n_tiles"]


@triton.jit(do_not_specialize=["dt_b", "dt_l", "dt_h", *SIZES])
def ssd_step_kernel(
    dt,  # (B, L, H)
    A,  # (H,)
    dt_bias,  # (H,) or None
    steps,  # (B, H, n_tiles, 4, BT)
    dt_b,
    dt_l,
    dt_h,
    L,
    H,
    E,
    chunk,
    parts,
    n_tiles,
    SOFTPLUS: tl.constexpr,
    BT: tl.constexpr,
):
    """Of a tile: step sizes, 0 outside of it; log2 of the decay from its start on, as a sum of two; d step / d dt.

    Differences of two such logarithms lose the digits of all decays before, which may be hundreds: so they are summed
    in float64, and kept as two float32.
    """
    i_h = tl.program_id(0) % H
    i_t = tl.program_id(0) // H % n_tiles
    i_b = (tl.program_id(0) // H // n_tiles).to(tl.int64)
    o_t, m_t = tokens(i_t, L, chunk, parts, BT)
    p_dt = dt + i_b * dt_b + i_h.to(tl.int64) * dt_h + o_t * dt_l.to(tl.int64)
    b_raw = tl.load(p_dt, mask=m_t, other=0.0).to(tl.float32)
    if dt_bias is not None:
        b_raw += tl.load(dt_bias + i_h)
    b_step, b_slope = step_size(b_raw, m_t, SOFTPLUS)
    b_log = tl.cumsum((b_step * (tl.load(A + i_h) * LOG2E)).to(tl.float64), 0)
    b_high = b_log.to(tl.float32)
    p_steps = place_steps(steps, i_b, i_h, i_t, H, n_tiles, BT) + tl.arange(0, BT)
    tl.store(p_steps, b_step)
    tl.store(p_steps + BT, b_high)
    tl.store(p_steps + 2 * BT, (b_log - b_high.to(tl.float64)).to(tl.float32))
    tl.store(p_steps + 3 * BT, b_slope)


@triton.jit(do_not_specialize=["v_b", "v_l", "v_h", "k_b", "k_l", "k_g", "state_s", *SIZES])
def ssd_state_kernel(
    v,  # (B, L, H, P): x, or dy with REVERSE
    k,  # (B, L, G, N): B, or C with REVERSE
    steps,  # (B, H, n_tiles, 4, BT)
    start,  # (B, H, P, N) or None
    states,  # (n_tiles + 1, B, H, P, N)
    v_b,
    v_l,
    v_h,
    k_b,
    k_l,
    k_g,
    state_s,
    L,
    H,
    E,
    chunk,
    parts,
    n_tiles,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    V_VEC: tl.constexpr,  # divides all strides of v
    K_VEC: tl.constexpr,  # and of k
):
    """h' = (decay of the tile) h + v^T (weights k), from boundary to boundary."""
    i_b = tl.program_id(0).to(tl.int64) // H
    i_h = tl.program_id(0) % H
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_n = tl.program_id(2) * BN + tl.arange(0, BN)
    v += i_b * multiple(v_b, V_VEC) + i_h * multiple(v_h, V_VEC)
    k += i_b * multiple(k_b, K_VEC) + i_h // E * multiple(k_g, K_VEC)
    o_state = (i_b * H + i_h) * P * N
    p_state = states + o_state + o_p[:, None] * N + o_n[None, :]
    m_state = (o_p < P)[:, None] & (o_n < N)[None, :]

    b_state = tl.zeros((BP, BN), tl.float32)
    if start is not None:
        b_state = load_state(start + o_state, o_p, o_n, P, N)
    if REVERSE:
        p_state += n_tiles.to(tl.int64) * state_s
    tl.store(p_state, b_state, mask=m_state)
    for i in range(n_tiles):
        i_t = n_tiles - 1 - i if REVERSE else i
        o_t, m_t = tokens(i_t, L, chunk, parts, BT)
        p_steps = place_steps(steps, i_b, i_h, i_t, H, n_tiles, BT)
        b_weight = decay_from_start(p_steps, BT) if REVERSE else decay_to_end(p_steps, BT) * row(p_steps, 0, BT)
        b_v = load_tile(v, o_t, m_t, multiple(v_l, V_VEC), o_p, P)
        b_k = load_tile(k, o_t, m_t, multiple(k_l, K_VEC), o_n, N)
        b_state *= decay_of_tile(p_steps, BT)
        b_state += tl.dot(tl.trans(b_v), b_weight[:, None] * b_k, input_precision=SPLIT)
        p_state += -state_s.to(tl.int64) if REVERSE else state_s.to(tl.int64)
        tl.store(p_state, b_state, mask=m_state)


@triton.jit(do_not_specialize=[*STRIDES, "state_s", *SIZES])
def ssd_out_kernel(
    x,  # (B, L, H, P)
    steps,  # (B, H, n_tiles, 4, BT)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (H, P) or None
    states,  # (n_tiles + 1, B, H, P, N)
    out,  # (B, L, H, P)
    x_b,
    x_l,
    x_h,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    state_s,
    L,
    H,
    E,
    chunk,
    parts,
    n_tiles,
    P: tl.constexpr,
    N: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    X_VEC: tl.constexpr,
    BC_VEC: tl.constexpr,
):
    """One tile of y: what tokens of the tile see of each other, of the state before it, and of themselves."""
    i_h = tl.program_id(0) % H
    i_t = tl.program_id(0) // H % n_tiles
    i_b = (tl.program_id(0) // H // n_tiles).to(tl.int64)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_t, m_t = tokens(i_t, L, chunk, parts, BT)
    x += i_b * multiple(x_b, X_VEC) + i_h * multiple(x_h, X_VEC)
    B += i_b * multiple(B_b, BC_VEC) + i_h // E * multiple(B_g, BC_VEC)
    C += i_b * multiple(C_b, BC_VEC) + i_h // E * multiple(C_g, BC_VEC)
    states += i_t.to(tl.int64) * state_s + (i_b * H + i_h) * P * N

    b_scores = tl.zeros((BT, BT), tl.float32)
    b_y = tl.zeros((BT, BP), tl.float32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        b_B = load_tile(B, o_t, m_t, multiple(B_l, BC_VEC), o_n, N)
        b_C = load_tile(C, o_t, m_t, multiple(C_l, BC_VEC), o_n, N)
        b_scores += tl.dot(b_C, tl.trans(b_B), input_precision=EXACT)
        b_y += tl.dot(b_C, tl.trans(load_state(states, o_p, o_n, P, N)), input_precision=SPLIT)

    p_steps = place_steps(steps, i_b, i_h, i_t, H, n_tiles, BT)
    b_weights = decays_between(p_steps, BT) * b_scores * row(p_steps, 0, BT)[None, :]
    b_x = load_tile(x, o_t, m_t, multiple(x_l, X_VEC), o_p, P)
    b_y = decay_from_start(p_steps, BT)[:, None] * b_y + tl.dot(b_weights, b_x, input_precision=SPLIT)
    if D is not None:
        b_y += tl.load(D + i_h * P + o_p, mask=o_p < P, other=0.0)[None, :] * b_x
    p_out = out + ((i_b * L + o_t[:, None]) * H + i_h) * P + o_p[None, :]
    tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m_t[:, None] & (o_p < P)[None, :])


@triton.jit(do_not_specialize=[*STRIDES, "state_s", *SIZES])
def ssd_input_grad_kernel(
    dout,  # (B, L, H, P)
    x,  # (B, L, H, P)
    steps,  # (B, H, n_tiles, 4, BT)
    A,  # (H,)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (H, P) or None
    states,  # (n_tiles + 1, B, H, P, N)
    d_states,  # (n_tiles + 1, B, H, P, N)
    dx,  # (B, L, H, P)
    d_dt,  # (B, L, H)
    dA,  # (B, n_tiles, H)
    dD,  # (B, n_tiles, H, P) or None
    x_b,
    x_l,
    x_h,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    state_s,
    L,
    H,
    E,
    chunk,
    parts,
    n_tiles,
    P: tl.constexpr,
    N: tl.constexpr,
    EXACT: tl.constexpr,
    EXACT_DY: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    X_VEC: tl.constexpr,
    BC_VEC: tl.constexpr,
):
    """Gradients of x and dt of one tile, and its part of those of A and D. Rows i are targets, columns j sources."""
    i_h = tl.program_id(0) % H
    i_t = tl.program_id(0) // H % n_tiles
    i_b = (tl.program_id(0) // H // n_tiles).to(tl.int64)
    o_part = (i_b * n_tiles + i_t) * H + i_h
    o_t, m_t = tokens(i_t, L, chunk, parts, BT)
    x += i_b * multiple(x_b, X_VEC) + i_h * multiple(x_h, X_VEC)
    B += i_b * multiple(B_b, BC_VEC) + i_h // E * multiple(B_g, BC_VEC)
    C += i_b * multiple(C_b, BC_VEC) + i_h // E * multiple(C_g, BC_VEC)
    o_out = (i_b * L * H + i_h) * P
    y_l = H.to(tl.int64) * P
    p_state = states + i_t.to(tl.int64) * state_s + (i_b * H + i_h) * P * N
    p_d_state = d_states + (i_t + 1).to(tl.int64) * state_s + (i_b * H + i_h) * P * N

    p_steps = place_steps(steps, i_b, i_h, i_t, H, n_tiles, BT)
    b_step = row(p_steps, 0, BT)
    b_to_end = decay_to_end(p_steps, BT)

    b_weights = tl.zeros((BT, BT), tl.float32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        b_B = load_tile(B, o_t, m_t, multiple(B_l, BC_VEC), o_n, N)
        b_C = load_tile(C, o_t, m_t, multiple(C_l, BC_VEC), o_n, N)
        b_weights += tl.dot(b_C, tl.trans(b_B), input_precision=EXACT)
    b_weights *= decays_between(p_steps, BT)

    b_d_weights = tl.zeros((BT, BT), tl.float32)
    b_d_step = tl.zeros((BT,), tl.float32)  # through s_t x_t
    b_d_to_end = tl.zeros((BT,), tl.float32)
    b_d_start = tl.zeros((BT,), tl.float32)  # of the decay from before the tile
    b_d_whole = tl.zeros((BP,), tl.float32)
    for p in range(0, P, BP):
        o_p = p + tl.arange(0, BP)
        b_from_end = tl.zeros((BT, BP), tl.float32)
        b_from_start = tl.zeros((BT, BP), tl.float32)
        for n in range(0, N, BN):
            o_n = n + tl.arange(0, BN)
            b_state = load_state(p_state, o_p, o_n, P, N)
            b_d_state = load_state(p_d_state, o_p, o_n, P, N)
            b_B = load_tile(B, o_t, m_t, multiple(B_l, BC_VEC), o_n, N)
            b_C = load_tile(C, o_t, m_t, multiple(C_l, BC_VEC), o_n, N)
            b_from_end += tl.dot(b_B, tl.trans(b_d_state), input_precision=SPLIT)
            b_from_start += tl.dot(b_C, tl.trans(b_state), input_precision=SPLIT)
            b_d_whole += tl.sum(b_state * b_d_state, 1)
        b_x = load_tile(x, o_t, m_t, multiple(x_l, X_VEC), o_p, P)
        b_dy = load_tile(dout + o_out, o_t, m_t, y_l, o_p, P)
        b_d_to_end += tl.sum(b_from_end * b_x, 1)
        b_d_start += tl.sum(b_from_start * b_dy, 1)
        b_d_weights += tl.dot(b_dy, tl.trans(b_x), input_precision=EXACT_DY)
        b_d_sx = b_to_end[:, None] * b_from_end
        b_d_sx += tl.dot(tl.trans(b_weights), b_dy, input_precision=SPLIT)
        b_d_step += tl.sum(b_d_sx * b_x, 1)
        b_dx = b_step[:, None] * b_d_sx
        if D is not None:
            b_dx += tl.load(D + i_h * P + o_p, mask=o_p < P, other=0.0)[None, :] * b_dy
            tl.store(dD + o_part * P + o_p, tl.sum(b_dy * b_x, 0), mask=o_p < P)
        p_dx = dx + o_out + o_t[:, None] * y_l + o_p[None, :]
        tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_t[:, None] & (o_p < P)[None, :])

    # log W[i, j] holds a_k of j < k <= i. (As a difference of sums over rows and columns da_k would lose its digits to
    # tokens after k.) The decay from before the tile to i holds a_k of k <= i, that from j to the end k > j, that of
    # the whole tile all.
    o_i = tl.arange(0, BT)
    m_after = o_i[:, None] > o_i[None, :]
    b_d_log = tl.where(m_after, b_d_weights * b_weights * b_step[None, :], 0.0)
    b_from_k = tl.cumsum(b_d_log, 0, reverse=True)
    b_d_to_end *= b_to_end * b_step
    b_d_start *= decay_from_start(p_steps, BT)
    b_da = tl.sum(tl.where(m_after, b_from_k + b_d_to_end[None, :], b_d_start[None, :]), 1)
    b_da += tl.sum(b_d_whole, 0) * decay_of_tile(p_steps, BT)
    p_d_dt = d_dt + (i_b * L + o_t) * H + i_h
    tl.store(p_d_dt, (b_da * tl.load(A + i_h) + b_d_step) * row(p_steps, 3, BT), mask=m_t)
    tl.store(dA + o_part, tl.sum(b_da * b_step, 0))


@triton.jit(do_not_specialize=[*STRIDES, "state_s", *SIZES])
def ssd_projection_grad_kernel(
    dout,  # (B, L, H, P)
    x,  # (B, L, H, P)
    steps,  # (B, H, n_tiles, 4, BT)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    states,  # (n_tiles + 1, B, H, P, N)
    d_states,  # (n_tiles + 1, B, H, P, N)
    dB,  # (B, L, G, N)
    dC,  # (B, L, G, N)
    x_b,
    x_l,
    x_h,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    state_s,
    L,
    H,
    E,
    chunk,
    parts,
    n_tiles,
    P: tl.constexpr,
    N: tl.constexpr,
    EXACT_DY: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    X_VEC: tl.constexpr,
    BC_VEC: tl.constexpr,
):
    """Gradients of B and C of one tile and group, BN columns of them: sums over the heads of the group."""
    G = H // E
    i_g = tl.program_id(0) % G
    i_t = tl.program_id(0) // G % n_tiles
    i_b = (tl.program_id(0) // G // n_tiles).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_t, m_t = tokens(i_t, L, chunk, parts, BT)
    x += i_b * multiple(x_b, X_VEC)
    dout += i_b * L * H * P
    y_l = H.to(tl.int64) * P
    states += i_t.to(tl.int64) * state_s + i_b * H * P * N
    d_states += (i_t + 1).to(tl.int64) * state_s + i_b * H * P * N

    b_d_scores = tl.zeros((BT, BT), tl.float32)
    b_dB = tl.zeros((BT, BN), tl.float32)
    b_dC = tl.zeros((BT, BN), tl.float32)
    for e in range(E):
        i_h = i_g * E + e
        p_steps = place_steps(steps, i_b, i_h, i_t, H, n_tiles, BT)
        b_to_end = decay_to_end(p_steps, BT) * row(p_steps, 0, BT)
        b_from_start = decay_from_start(p_steps, BT)
        b_d_weights = tl.zeros((BT, BT), tl.float32)
        for p in range(0, P, BP):
            o_p = p + tl.arange(0, BP)
            b_x = load_tile(x + i_h * multiple(x_h, X_VEC), o_t, m_t, multiple(x_l, X_VEC), o_p, P)
            b_dy = load_tile(dout + i_h * P, o_t, m_t, y_l, o_p, P)
            b_d_weights += tl.dot(b_dy, tl.trans(b_x), input_precision=EXACT_DY)
            o_head = i_h.to(tl.int64) * P * N
            b_d_state = load_state(d_states + o_head, o_p, o_n, P, N)
            b_dB += tl.dot(b_to_end[:, None] * b_x, b_d_state, input_precision=SPLIT)
            b_state = load_state(states + o_head, o_p, o_n, P, N)
            b_dC += tl.dot(b_from_start[:, None] * b_dy, b_state, input_precision=SPLIT)
        b_d_scores += b_d_weights * decays_between(p_steps, BT) * row(p_steps, 0, BT)[None, :]

    p_B = B + i_b * multiple(B_b, BC_VEC) + i_g * multiple(B_g, BC_VEC)
    p_C = C + i_b * multiple(C_b, BC_VEC) + i_g * multiple(C_g, BC_VEC)
    b_C = load_tile(p_C, o_t, m_t, multiple(C_l, BC_VEC), o_n, N)
    b_dB += tl.dot(tl.trans(b_d_scores), b_C, input_precision=SPLIT)
    b_B = load_tile(p_B, o_t, m_t, multiple(B_l, BC_VEC), o_n, N)
    b_dC += tl.dot(b_d_scores, b_B, input_precision=SPLIT)
    o_out = ((i_b * L + o_t[:, None]) * G + i_g) * N + o_n[None, :]
    m_out = m_t[:, None] & (o_n < N)[None, :]
    tl.store(dB + o_out, b_dB.to(dB.dtype.element_ty), mask=m_out)
    tl.store(dC + o_out, b_dC.to(dC.dtype.element_ty), mask=m_out)


# ---- launchers ------------------------------------------------------------------------------------------------------

# Largest BT, BP and BN, warps and stages, such that the compilers for sm_80 and sm_90 keep everything in registers.
# The walk takes the tiles of its caller; the two gradients share theirs.
WALK = {"BP": 32, "BN": 32, "num_warps": 8}
OUT = {"BT": 64, "BP": 32, "BN": 32, "num_warps": 8}
INPUT_GRAD = {"BT": 32, "BP": 16, "BN": 16, "num_warps": 2, "num_stages": 1}
PROJECTION_GRAD = {"BT": 32, "BP": 16, "BN": 64, "num_warps": 8, "num_stages": 1}


def forward(
    x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus: bool, chunk_size: int, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, L, H, P), final states (B, H, P, N), the state before every chunk and after the last)"""
    x, B, C = (_last_contiguous(t) for t in (x, B, C))
    out = x.new_empty(x.shape, dtype=out_dtype)
    size = _tiles(x, B, chunk_size, OUT["BT"])
    parts, n_tiles = size[-2:]
    grid, constants = _plan(x, B, OUT)
    with torch.cuda.device_of(x):
        steps = _steps(dt, A, dt_bias, dt_softplus, size, OUT["BT"])
        states = _walk(x, B, steps, initial_states, size, reverse=False)
        ssd_out_kernel[x.shape[0] * n_tiles * x.shape[2], grid[0]](
            *(x, steps, B, C, _per_channel(D, x), states, out),
            *(*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], states.stride(0), *size),
            EXACT=_exact(x),
            X_VEC=_vector_width(x),
            BC_VEC=_vector_width(B, C),
            **constants,
        )
    return out, states[-1].clone(), states[::parts].contiguous()


def backward(
    dout, dfinal_states, x, dt, A, B, C, D, dt_bias, states, dt_softplus: bool, chunk_size: int
) -> tuple[Tensor, ...]:
    """Gradients of (x, dt, A, B, C, D, dt_bias, initial states); absent ones as tensors without elements."""
    x, B, C, dout = _last_contiguous(x), _last_contiguous(B), _last_contiguous(C), dout.contiguous()
    batch, _, heads, head_dim = x.shape
    size = _tiles(x, B, chunk_size, INPUT_GRAD["BT"])
    parts, n_tiles = size[-2:]

    dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
    d_dt = x.new_empty(dt.shape, dtype=torch.float32)
    dA = x.new_empty((batch, n_tiles, heads), dtype=torch.float32)
    dD = None if D is None else x.new_empty((batch, n_tiles, heads, head_dim), dtype=torch.float32)
    vectors = {"X_VEC": _vector_width(x), "BC_VEC": _vector_width(B, C), "EXACT_DY": _exact(x, dout)}
    with torch.cuda.device_of(x):
        steps = _steps(dt, A, dt_bias, dt_softplus, size, INPUT_GRAD["BT"])
        if parts > 1:
            states = _walk(x, B, steps, states[0], size, reverse=False)
        d_states = _walk(dout, C, steps, dfinal_states, size, reverse=True)
        strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], states.stride(0), *size)
        _, constants = _plan(x, B, INPUT_GRAD)
        ssd_input_grad_kernel[(batch * n_tiles * heads,)](
            *(dout, x, steps, A.contiguous(), B, C, _per_channel(D, x), states, d_states, dx, d_dt, dA, dD),
            *strides,
            EXACT=_exact(x),
            **vectors,
            **constants,
        )
        grid, constants = _plan(x, B, PROJECTION_GRAD)
        ssd_projection_grad_kernel[batch * n_tiles * B.shape[2], grid[1]](
            *(dout, x, steps, B, C, states, d_states, dB, dC), *strides, **vectors, **constants
        )
    absent = [x.new_empty(0) for _ in range(2)]  # two, for the outputs of an operator may not share memory
    if D is not None:
        dD = dD.sum((0, 1)) if D.dim() == 2 else dD.sum((0, 1, 3))
    return (
        dx,
        d_dt.to(dt.dtype),
        dA.sum((0, 1)),
        dB,
        dC,
        absent[0] if D is None else dD,
        absent[1] if dt_bias is None else d_dt.sum((0, 1)),
        d_states[0].clone(),
    )


def _steps(dt, A, dt_bias, dt_softplus: bool, size: tuple[int, ...], block: int) -> Tensor:
    """What `ssd_step_kernel` says of every tile: (B, H, n_tiles, 4, BT)"""
    (batch, _, heads), n_tiles = dt.shape, size[-1]
    steps = dt.new_empty((batch, heads, n_tiles, 4, block), dtype=torch.float32)
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    ssd_step_kernel[(batch * n_tiles * heads,)](
        *(dt, A.contiguous(), dt_bias, steps, *dt.stride(), *size), SOFTPLUS=dt_softplus, BT=block, num_warps=1
    )
    return steps


def _walk(v, k, steps, start: Tensor | None, size: tuple[int, ...], reverse: bool) -> Tensor:
    """The state at every boundary, (n_tiles + 1, B, H, P, N), from `start` on, or its gradient with `reverse`."""
    batch, _, heads, head_dim = v.shape
    states = v.new_empty((size[-1] + 1, batch, heads, head_dim, k.shape[3]), dtype=torch.float32)
    grid, constants = _plan(v, k, WALK | {"BT": steps.shape[-1]})
    ssd_state_kernel[batch * heads, grid[0], grid[1]](
        *(v, k, steps, None if start is None else start.contiguous(), states),
        *(*v.stride()[:3], *k.stride()[:3], states.stride(0), *size),
        REVERSE=reverse,
        V_VEC=_vector_width(v),
        K_VEC=_vector_width(k),
        **constants,
    )
    return states


def _tiles(x: Tensor, B: Tensor, chunk_size: int, block: int) -> tuple[int, ...]:
    """L, H, E, tokens of a chunk, tiles of a chunk, tiles of a sample"""
    (_, length, heads, _), groups = x.shape, B.shape[2]
    chunk = min(chunk_size, length)
    parts = triton.cdiv(chunk, block)
    return length, heads, heads // groups, chunk, parts, triton.cdiv(length, chunk) * parts


def _plan(x: Tensor, B: Tensor, largest: dict[str, int]) -> tuple[tuple[int, int], dict]:
    """Blocks of P and of N, and constants. They know nothing of the size of the image."""
    head_dim, n_state = x.shape[3], B.shape[3]
    blocks = {
        "BP": min(largest["BP"], max(16, triton.next_power_of_2(head_dim))),  # a product takes no less than 16
        "BN": min(largest["BN"], max(16, triton.next_power_of_2(n_state))),
    }
    grid = triton.cdiv(head_dim, blocks["BP"]), triton.cdiv(n_state, blocks["BN"])
    split = "ieee" if B.dtype == torch.float32 else "tf32x3"
    return grid, largest | blocks | {"P": head_dim, "N": n_state, "SPLIT": split}


def _exact(*tensors: Tensor) -> str:
    """The precision in which products of these inputs lose nothing."""
    return "ieee" if tensors[0].dtype == torch.float32 else "tf32x3" if tensors[-1].dtype == torch.float32 else "tf32"


def _per_channel(D: Tensor | None, x: Tensor) -> Tensor | None:
    """(H,) or (H, P) -> (H, P)"""
    return None if D is None else D.reshape(D.shape[0], -1).expand(x.shape[2:]).contiguous()


def _last_contiguous(x: Tensor) -> Tensor:
    """x with stride 1 in the last dimension; its other strides stay."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _vector_width(*tensors: Tensor) -> int:
    """The largest power of 2, up to 16 bytes, that divides all strides of these tensors but the last, which is 1."""
    strides = [s for x in tensors for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return math.gcd(16 // tensors[0].element_size(), *strides)
