"""Kernels of the chunked SSD in Triton for the gradients of one tile. The plan and the shapes are in triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

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
    i, i_n = split_program(N, BN)
    i_g = i % G
    i_t = i // G % n_tiles
    i_b = (i // G // n_tiles).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
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
