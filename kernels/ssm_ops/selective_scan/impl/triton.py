"""Selective scan in Triton: one kernel forward, one backward; each reads every input once.

A program owns BD channels of one group of one sample and walks along time, tile after tile. A tile (BD, BT) is read
along time, which is contiguous, and lies in registers such that a thread holds runs of K = 2^LOG_K consecutive tokens
of a channel. The K tokens of a run are visited one after the other, as in the definition; only what leaves the runs,
(BD, R), is scanned across threads. Backward in time this costs the same as forward, which
``tl.associative_scan(reverse=True)`` does not: that turns every tile around with shuffles, twice.

Where a backward follows, the forward keeps the state before every tile, and the backward recomputes those in between. A
program writes only what it owns: the gradients of B and C leave as one partial sum per block of channels, and those of
the parameters as one per sample, to be added up in a fixed order. So the same call gives the same bits.

Shapes: B batch, G groups, E = D / G channels of a group, D channels, Dd channels of delta, N state, L tokens;
of a program: BD channels, BT tokens of a tile, R = BT / K runs of a tile, BN = N rounded up to a power of 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import check_states
from ..._triton import LOG2E, join_runs, split_runs, step_size
from ..api import STATE_CHUNK, states_shape

# ---- scans of one tile ----------------------------------------------------------------------------------------------


@triton.jit
def carry_runs(b_p, b_q, b_in, LOG_R: tl.constexpr, REVERSE: tl.constexpr):
    """What enters every run, (BD, R), and what leaves the last one, (BD,).

    A run turns what enters it, v, into p v + q; b_in (BD,) enters the first one. With REVERSE the runs are passed from
    the last to the first.
    """
    R: tl.constexpr = 1 << LOG_R
    o_r = tl.broadcast_to(tl.arange(0, R)[None, :], b_p.shape)
    for i in tl.static_range(LOG_R):
        o_from = o_r + (1 << i) if REVERSE else o_r - (1 << i)
        m_from = (o_from >= 0) & (o_from < R)
        o_from = tl.where(m_from, o_from, o_r)
        b_p_from = tl.gather(b_p, o_from, 1)
        b_q_from = tl.gather(b_q, o_from, 1)
        b_q = tl.where(m_from, b_p * b_q_from + b_q, b_q)
        b_p = tl.where(m_from, b_p * b_p_from, b_p)
    b_left = b_p * b_in[:, None] + b_q
    o_from = o_r + 1 if REVERSE else o_r - 1
    m_from = (o_from >= 0) & (o_from < R)
    b_entered = tl.where(m_from, tl.gather(b_left, tl.where(m_from, o_from, o_r), 1), b_in[:, None])
    LAST: tl.constexpr = 0 if REVERSE else R - 1
    return b_entered, tl.sum(tl.where(o_r == LAST, b_left, 0.0), 1)


@triton.jit
def scan_forward(b_a, b_x, b_h, LOG_K: tl.constexpr, LOG_R: tl.constexpr):
    """h_t = a_t h_{t-1} + x_t over a tile (BD, BT), from the state b_h (BD,). Returns all h and the last."""
    K: tl.constexpr = 1 << LOG_K
    a = split_runs(b_a, LOG_K)
    x = split_runs(b_x, LOG_K)
    b_p, b_q = a[0], x[0]
    for j in tl.static_range(1, K):
        b_p = b_p * a[j]
        b_q = b_q * a[j] + x[j]
    b_now, b_last = carry_runs(b_p, b_q, b_h, LOG_R, False)
    h = ()
    for j in tl.static_range(K):
        b_now = b_now * a[j] + x[j]
        h = h + (b_now,)
    return join_runs(h, LOG_K), b_last


@triton.jit
def scan_backward(b_a, b_g, b_w, LOG_K: tl.constexpr, LOG_R: tl.constexpr):
    """lambda_t = g_t + a_{t+1} lambda_{t+1} over a tile (BD, BT), where b_w (BD,) is the last such product.

    Returns all lambda, and a lambda of the first token: the b_w of the tile before.
    """
    K: tl.constexpr = 1 << LOG_K
    a = split_runs(b_a, LOG_K)
    g = split_runs(b_g, LOG_K)
    b_p, b_q = a[0], a[K - 1] * g[K - 1]
    for j in tl.static_range(1, K):
        b_p = b_p * a[j]  # in the order of scan_forward, so that the two share it
        b_q = (b_q + g[K - 1 - j]) * a[K - 1 - j]
    b_now, b_first = carry_runs(b_p, b_q, b_w, LOG_R, True)
    lam = ()
    for j in tl.static_range(K):
        b_lam = g[K - 1 - j] + b_now
        b_now = a[K - 1 - j] * b_lam
        lam = (b_lam,) + lam
    return join_runs(lam, LOG_K), b_first


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def place(G, E, BD: tl.constexpr):
    """(sample, group, block of channels) of this program. The blocks of a group are neighbours: they share B and C."""
    n_blocks = tl.cdiv(E, BD)
    i = tl.program_id(0).to(tl.int64)
    return i // n_blocks // G, i // n_blocks % G, i % n_blocks


@triton.jit
def multiple(x, VEC: tl.constexpr):
    """x, which is a multiple of VEC: the compiler learns it, and vectorises accesses."""
    return x // VEC * VEC


@triton.jit
def rows(x, i_b, o_d, stride_b, stride_d, VEC: tl.constexpr):
    """Pointers to the rows (BD, 1) of channels o_d."""
    return x + i_b * multiple(stride_b, VEC) + o_d[:, None] * multiple(stride_d, VEC)


@triton.jit
def column(b_x, o_n, n):
    """Column n of (BD, BN): (BD,)"""
    return tl.sum(tl.where(o_n == n, b_x, 0.0), 1)


STRIDES = [f"{x}_{dim}" for x in ("u", "delta", "z") for dim in "bd"] + [f"{x}_{dim}" for x in "BC" for dim in "bgn"]
SIZES = ["L", "G", "E", "repeat"]


@triton.jit(do_not_specialize=[*STRIDES, *SIZES, "state_s"])
def selective_scan_fwd_kernel(
    u,  # (B, D, L)
    delta,  # (B, Dd, L)
    A,  # (D, N)
    B,  # (B, G, N, L)
    C,  # (B, G, N, L)
    D,  # (D,) or None
    z,  # (B, D, L) or None
    delta_bias,  # (Dd,) or None
    out,  # (B, D, L)
    last,  # (B, D, N)
    states,  # (S + 1, B, G, N, E) or None
    u_b,
    u_d,
    delta_b,
    delta_d,
    z_b,
    z_d,
    B_b,
    B_g,
    B_n,
    C_b,
    C_g,
    C_n,
    state_s,
    L,
    G,
    E,
    repeat,  # channels that share a channel of delta
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    LOG_K: tl.constexpr,
    LOG_R: tl.constexpr,
    VEC: tl.constexpr,  # divides L and all strides
    STAGES: tl.constexpr,
):
    BT: tl.constexpr = 1 << (LOG_K + LOG_R)
    L = multiple(L, VEC)
    i_b, i_g, i_e = place(G, E, BD)
    o_e = i_e * BD + tl.arange(0, BD)
    o_d = i_g * E + o_e
    m_d = o_e < E
    o_n = tl.arange(0, BN)[None, :]
    m_dn = m_d[:, None] & (o_n < N)

    p_u = rows(u, i_b, o_d, u_b, u_d, VEC)
    p_delta = rows(delta, i_b, o_d // repeat, delta_b, delta_d, VEC)
    p_out = rows(out, i_b * G * E, o_d, L, L, VEC)
    p_B = B + i_b * multiple(B_b, VEC) + i_g * multiple(B_g, VEC)
    p_C = C + i_b * multiple(C_b, VEC) + i_g * multiple(C_g, VEC)
    if z is not None:
        p_z = rows(z, i_b, o_d, z_b, z_d, VEC)

    b_state = tl.zeros((BD, BN), tl.float32)
    if states is not None:
        p_state = states + (i_b * G + i_g) * N * E + o_e
        tl.store(p_state[:, None] + o_n * E, b_state, mask=m_dn)
    for i_t in tl.range(0, tl.cdiv(L, BT), num_stages=STAGES):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < L
        m_tile = m_d[:, None] & m_t[None, :]
        b_u = tl.load(p_u + o_t, mask=m_tile, other=0.0).to(tl.float32)
        b_raw = tl.load(p_delta + o_t, mask=m_tile, other=0.0).to(tl.float32)
        if delta_bias is not None:
            b_raw += tl.load(delta_bias + o_d // repeat, mask=m_d, other=0.0)[:, None]
        b_dt, _ = step_size(b_raw, m_tile, SOFTPLUS)
        b_dtu = b_dt * b_u
        b_y = tl.zeros((BD, BT), tl.float32)
        if D is not None:
            b_y += tl.load(D + o_d, mask=m_d, other=0.0)[:, None] * b_u

        if states is not None:
            p_state += state_s
        for n in range(N):
            b_A = tl.load(A + o_d * N + n, mask=m_d, other=0.0)
            b_B = tl.load(p_B + n * multiple(B_n, VEC).to(tl.int64) + o_t, mask=m_t, other=0.0).to(tl.float32)
            b_C = tl.load(p_C + n * multiple(C_n, VEC).to(tl.int64) + o_t, mask=m_t, other=0.0).to(tl.float32)
            b_a = tl.exp2(b_dt * (b_A * LOG2E)[:, None])
            b_h, b_last = scan_forward(b_a, b_dtu * b_B[None, :], column(b_state, o_n, n), LOG_K, LOG_R)
            b_y += b_h * b_C[None, :]
            b_state = tl.where(o_n == n, b_last[:, None], b_state)
            if states is not None:
                tl.store(p_state + n * E, b_last, mask=m_d)

        if z is not None:
            b_z = tl.load(p_z + o_t, mask=m_tile, other=0.0).to(tl.float32)
            b_y *= b_z / (1.0 + tl.exp2(-b_z * LOG2E))
        tl.store(p_out + o_t, b_y.to(out.dtype.element_ty), mask=m_tile)
    tl.store(last + (i_b * G * E + o_d[:, None]) * N + o_n, b_state, mask=m_dn)


@triton.jit(do_not_specialize=[*STRIDES, *SIZES, "dout_b", "dout_d", "state_s", "part_s"])
def selective_scan_bwd_kernel(
    dout,  # (B, D, L)
    u,  # (B, D, L)
    delta,  # (B, Dd, L)
    A,  # (D, N)
    B,  # (B, G, N, L)
    C,  # (B, G, N, L)
    D,  # (D,) or None
    z,  # (B, D, L) or None
    delta_bias,  # (Dd,) or None
    states,  # (S + 1, B, G, N, E)
    du,  # (B, D, L)
    ddelta,  # (B, D, L), of every channel
    dA,  # (B, D, N), of every sample
    dB,  # (blocks, B, G, N, L), of every block of channels
    dC,  # (blocks, B, G, N, L)
    dD,  # (B, D) or None
    dz,  # (B, D, L) or None
    dbias,  # (B, D) or None
    dout_b,
    dout_d,
    u_b,
    u_d,
    delta_b,
    delta_d,
    z_b,
    z_d,
    B_b,
    B_g,
    B_n,
    C_b,
    C_g,
    C_n,
    state_s,
    part_s,
    L,
    G,
    E,
    repeat,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    LOG_K: tl.constexpr,
    LOG_R: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    BT: tl.constexpr = 1 << (LOG_K + LOG_R)
    L = multiple(L, VEC)
    i_b, i_g, i_e = place(G, E, BD)
    o_e = i_e * BD + tl.arange(0, BD)
    o_d = i_g * E + o_e
    m_d = o_e < E
    o_n = tl.arange(0, BN)[None, :]

    p_dout = rows(dout, i_b, o_d, dout_b, dout_d, VEC)
    p_u = rows(u, i_b, o_d, u_b, u_d, VEC)
    p_delta = rows(delta, i_b, o_d // repeat, delta_b, delta_d, VEC)
    p_B = B + i_b * multiple(B_b, VEC) + i_g * multiple(B_g, VEC)
    p_C = C + i_b * multiple(C_b, VEC) + i_g * multiple(C_g, VEC)
    p_du = rows(du, i_b * G * E, o_d, L, L, VEC)
    p_ddelta = rows(ddelta, i_b * G * E, o_d, L, L, VEC)
    o_part = i_e * part_s + (i_b * G + i_g) * N * L
    p_state = states + (i_b * G + i_g) * N * E + o_e
    if z is not None:
        p_z = rows(z, i_b, o_d, z_b, z_d, VEC)
        p_dz = rows(dz, i_b * G * E, o_d, L, L, VEC)

    b_w = tl.zeros((BD, BN), tl.float32)  # the part of lambda that comes from the tile after
    b_dA = tl.zeros((BD, BN), tl.float32)
    b_dD = tl.zeros((BD,), tl.float32)
    b_dbias = tl.zeros((BD,), tl.float32)
    n_tiles = tl.cdiv(L, BT)
    for i in tl.range(0, n_tiles, num_stages=STAGES):
        i_t = n_tiles - 1 - i
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < L
        m_tile = m_d[:, None] & m_t[None, :]
        b_u = tl.load(p_u + o_t, mask=m_tile, other=0.0).to(tl.float32)
        b_raw = tl.load(p_delta + o_t, mask=m_tile, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dout + o_t, mask=m_tile, other=0.0).to(tl.float32)
        if delta_bias is not None:
            b_raw += tl.load(delta_bias + o_d // repeat, mask=m_d, other=0.0)[:, None]
        b_dt, b_slope = step_size(b_raw, m_tile, SOFTPLUS)
        b_dtu = b_dt * b_u
        if z is not None:
            b_z = tl.load(p_z + o_t, mask=m_tile, other=0.0).to(tl.float32)
            b_gate = 1.0 / (1.0 + tl.exp2(-b_z * LOG2E))
            b_dz = b_dy * b_gate * (1.0 + b_z * (1.0 - b_gate))  # still to be multiplied by y
            b_dy *= b_z * b_gate
            b_y = tl.zeros((BD, BT), tl.float32)
        b_lamB = tl.zeros((BD, BT), tl.float32)  # sum over the states of lambda B
        b_ddecay = tl.zeros((BD, BT), tl.float32)  # gradient of dt through exp(dt A)

        for n in range(N):
            b_A = tl.load(A + o_d * N + n, mask=m_d, other=0.0)
            b_B = tl.load(p_B + n * multiple(B_n, VEC).to(tl.int64) + o_t, mask=m_t, other=0.0).to(tl.float32)
            b_C = tl.load(p_C + n * multiple(C_n, VEC).to(tl.int64) + o_t, mask=m_t, other=0.0).to(tl.float32)
            b_h = tl.load(p_state + i_t * state_s.to(tl.int64) + n * E, mask=m_d, other=0.0)
            b_a = tl.exp2(b_dt * (b_A * LOG2E)[:, None])
            b_x = b_dtu * b_B[None, :]
            b_h, _ = scan_forward(b_a, b_x, b_h, LOG_K, LOG_R)
            b_lam, b_first = scan_backward(b_a, b_dy * b_C[None, :], column(b_w, o_n, n), LOG_K, LOG_R)
            b_w = tl.where(o_n == n, b_first[:, None], b_w)
            if z is not None:
                b_y += b_h * b_C[None, :]

            b_dlog = b_lam * (b_h - b_x)  # h_t - x_t = a_t h_{t-1}
            b_ddecay += b_dlog * b_A[:, None]
            b_lamB += b_lam * b_B[None, :]
            b_dA += tl.where(o_n == n, tl.sum(b_dlog * b_dt, 1)[:, None], 0.0)
            b_dB, b_dC = tl.split(tl.sum(tl.join(b_lam * b_dtu, b_h * b_dy), 0))
            o_n_t = o_part + n * L.to(tl.int64) + o_t
            tl.store(dB + o_n_t, b_dB, mask=m_t)
            tl.store(dC + o_n_t, b_dC, mask=m_t)

        b_du = b_lamB * b_dt
        b_draw = (b_lamB * b_u + b_ddecay) * b_slope
        if D is not None:
            b_D = tl.load(D + o_d, mask=m_d, other=0.0)[:, None]
            b_du += b_D * b_dy
            b_dD += tl.sum(b_dy * b_u, 1)
            if z is not None:
                b_y += b_D * b_u
        if delta_bias is not None:
            b_dbias += tl.sum(b_draw, 1)
        tl.store(p_du + o_t, b_du.to(du.dtype.element_ty), mask=m_tile)
        tl.store(p_ddelta + o_t, b_draw.to(ddelta.dtype.element_ty), mask=m_tile)
        if z is not None:
            tl.store(p_dz + o_t, (b_dz * b_y).to(dz.dtype.element_ty), mask=m_tile)

    o_channel = i_b * G * E + o_d
    tl.store(dA + o_channel[:, None] * N + o_n, b_dA, mask=m_d[:, None] & (o_n < N))
    if D is not None:
        tl.store(dD + o_channel, b_dD, mask=m_d)
    if delta_bias is not None:
        tl.store(dbias + o_channel, b_dbias, mask=m_d)


# ---- launchers ------------------------------------------------------------------------------------------------------

MANY_PROGRAMS = 512
"""So many programs keep a large GPU busy, about four per multiprocessor; blocks of channels shrink to reach it."""


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype, keep_states) -> tuple[Tensor, ...]:
    """(out (B, D, L), last state (B, D, N), the state before every tile and after the last (S + 1, B, G, N, E), which
    has no elements without `keep_states`)"""
    u, delta, B, C, z = (_time_contiguous(x) for x in (u, delta, B, C, z))
    A, D, delta_bias = (None if x is None else x.contiguous() for x in (A, D, delta_bias))
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    out = u.new_empty(u.shape, dtype=out_dtype)
    last = u.new_empty((batch, dim, n_state), dtype=torch.float32)
    states = u.new_empty(states_shape(u, B, "triton") if keep_states else (0,), dtype=torch.float32)
    grid, blocks = _plan(u, groups, n_state, _vector_width([u, delta, B, C, z]), max_warps=1)
    with torch.cuda.device_of(u):
        selective_scan_fwd_kernel[grid](
            *(u, delta, A, B, C, D, z, delta_bias, out, last, states if keep_states else None),
            *_strides(u, delta, z, B, C),
            *(states.stride(0), length, groups, dim // groups, dim // delta.shape[1]),
            N=n_state,
            SOFTPLUS=delta_softplus,
            STAGES=3,
            **blocks,
        )
    return out, last, states


def backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias); absent ones as tensors without elements."""
    check_states("selective_scan", states, states_shape(u, B, "triton"))
    dout, u, delta, B, C, z = (_time_contiguous(x) for x in (dout, u, delta, B, C, z))
    A, D, delta_bias = (None if x is None else x.contiguous() for x in (A, D, delta_bias))
    (batch, dim, length), (groups, n_state) = u.shape, B.shape[1:3]
    repeat = dim // delta.shape[1]
    grid, blocks = _plan(u, groups, n_state, _vector_width([u, dout, delta, B, C, z]), max_warps=4)
    n_blocks = triton.cdiv(dim // groups, blocks["BD"])

    du, dz = (None if x is None else x.new_empty(x.shape, dtype=x.dtype) for x in (u, z))
    d_delta = u.new_empty(u.shape, dtype=delta.dtype if repeat == 1 else torch.float32)
    dA = u.new_empty((batch, dim, n_state), dtype=torch.float32)
    dB, dC = (u.new_empty((n_blocks, *x.shape), dtype=torch.float32) for x in (B, C))
    dD, d_bias = (None if x is None else dA.new_empty((batch, dim), dtype=torch.float32) for x in (D, delta_bias))
    with torch.cuda.device_of(u):
        selective_scan_bwd_kernel[grid](
            *(dout, u, delta, A, B, C, D, z, delta_bias, states, du, d_delta, dA, dB, dC, dD, dz, d_bias),
            *_strides(dout, u, delta, z, B, C),
            *(states.stride(0), dB.stride(0), length, groups, dim // groups, repeat),
            N=n_state,
            SOFTPLUS=delta_softplus,
            STAGES=2,
            **blocks,
        )
    absent = [u.new_empty(0) for _ in range(3)]  # three, for the outputs of an operator may not share memory
    return (
        du,
        d_delta if repeat == 1 else d_delta.unflatten(1, (-1, repeat)).sum(2).to(delta.dtype),
        dA.sum(0),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        absent[0] if D is None else dD.sum(0),
        absent[1] if z is None else dz,
        absent[2] if delta_bias is None else d_bias.sum(0).unflatten(0, (-1, repeat)).sum(1),
    )


def _time_contiguous(x: Tensor | None) -> Tensor | None:
    """x with stride 1 along time; its other strides stay."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """All strides but those of time, which are 1; of an absent z zeros."""
    return [s for x in tensors for s in ((0, 0) if x is None else x.stride()[:-1])]


def _vector_width(tensors: list[Tensor | None]) -> int:
    """The largest power of 2, up to 16 bytes of the first tensor, that divides the length and all strides."""
    width = math.gcd(16 // tensors[0].element_size(), tensors[0].shape[-1])
    for x in tensors:
        if x is not None:
            width = math.gcd(width, *(s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1))
    return width


def _plan(u: Tensor, groups: int, n_state: int, width: int, max_warps: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and block sizes. They know the sizes only as a few powers of 2: that bounds the number of compilations."""
    batch, dim, length = u.shape
    channels, tile = dim // groups, STATE_CHUNK["triton"]
    if length <= tile // 2:
        tile //= 2
    run = width if width >= 4 else 16 // u.element_size()
    per_warp = 512 // tile  # 16 numbers of a tile per thread
    block = min(per_warp * max_warps, triton.next_power_of_2(max(channels, 1)))
    while u.is_cuda and block > 2 and batch * groups * triton.cdiv(channels, block) < MANY_PROGRAMS:
        block //= 2
    blocks = {
        "BD": block,
        "BN": triton.next_power_of_2(n_state),
        "LOG_K": run.bit_length() - 1,
        "LOG_R": (tile // run).bit_length() - 1,
        "VEC": width,
        "num_warps": max(1, block // per_warp),
    }
    return (batch * groups * triton.cdiv(channels, block),), blocks
