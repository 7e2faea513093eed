"""Kernels of the chunked SSD in Triton that the forward runs: the steps of all tiles, the states between them, and y.

The backward runs the first two again. The plan and the shapes are in triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton import LOG2E, step_size
from .triton_tiles import (
    SIZES,
    STRIDES,
    decay_from_start,
    decay_of_tile,
    decay_to_end,
    decays_between,
    load_state,
    load_tile,
    multiple,
    place_steps,
    row,
    split_program,
    tokens,
)


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
    i, i_n = split_program(N, BN)
    n_p: tl.constexpr = (P + BP - 1) // BP
    i_p, i = i % n_p, i // n_p
    i_b, i_h = (i // H).to(tl.int64), i % H
    o_p = i_p * BP + tl.arange(0, BP)
    o_n = i_n * BN + tl.arange(0, BN)
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
    i, i_p = split_program(P, BP)
    i_h = i % H
    i_t = i // H % n_tiles
    i_b = (i // H // n_tiles).to(tl.int64)
    o_p = i_p * BP + tl.arange(0, BP)
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
