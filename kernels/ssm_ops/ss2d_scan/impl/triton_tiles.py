"""What the kernels of triton_kernels.py are made of: places on routes, tiles in runs, and how runs are composed."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton import split_runs

# ---- routes ---------------------------------------------------------------------------------------------------------


@triton.jit
def place(dim, ways, BD: tl.constexpr):
    """(sample, way, block of channels) of this program, in 64 bits. The blocks of a sample are neighbours."""
    n_blocks = tl.cdiv(dim, BD)
    i = tl.program_id(0).to(tl.int64)
    return i // n_blocks // ways, i // n_blocks % ways, i % n_blocks


@triton.jit
def route(i):
    """Route number i as programs walk them, 0 2 1 3: where one ends the next one starts, in the cache."""
    return i % 2 * 2 + i // 2


# ---- a tile in runs -------------------------------------------------------------------------------------------------


@triton.jit
def to_runs(b_x, BD: tl.constexpr, LOG_K: tl.constexpr, LOG_R: tl.constexpr):
    """(BT, BD) -> K tiles (C,)"""
    K: tl.constexpr = 1 << LOG_K
    R: tl.constexpr = 1 << LOG_R
    b_x = tl.reshape(tl.permute(tl.reshape(b_x, (R, K, BD)), (0, 2, 1)), (R * BD, K))
    columns = split_runs(b_x, LOG_K)
    parts = ()
    for j in tl.static_range(K):
        parts = parts + (tl.reshape(columns[j], (R * BD,)),)
    return parts


@triton.jit
def join_tokens(parts, LOG_K: tl.constexpr):
    """K tiles (C,) -> (K, C). Where a thread holds a column the selections are known when it is compiled."""
    K: tl.constexpr = 1 << LOG_K
    o_k = tl.arange(0, K)[:, None]
    b_x = tl.broadcast_to(parts[0][None, :], (K, parts[0].shape[0]))
    for j in tl.static_range(1, K):
        b_x = tl.where(o_k == j, parts[j][None, :], b_x)
    return b_x


@triton.jit
def from_runs(parts, BD: tl.constexpr, LOG_K: tl.constexpr, LOG_R: tl.constexpr):
    """The inverse of `to_runs`."""
    K: tl.constexpr = 1 << LOG_K
    R: tl.constexpr = 1 << LOG_R
    b_x = tl.reshape(join_tokens(parts, LOG_K), (K, R, BD))
    return tl.reshape(tl.permute(b_x, (1, 0, 2)), (R * K, BD))


@triton.jit
def add_to_map(out, sums, parts, at, dim, o_rc, o_l, L, m_rc, i, n_routes, LOG_K: tl.constexpr):
    """Add the tile to what the routes before number i have left in sums; the last one of n_routes writes to out."""
    m_sums = m_rc & (i > 0)
    totals = ()
    for j in tl.static_range(1 << LOG_K):
        totals = totals + (parts[j] + tl.load(sums + at[j] * dim + o_rc, mask=m_sums, other=0.0),)
    if i == n_routes - 1:
        for j in tl.static_range(1 << LOG_K):
            m_j = m_rc & (o_l + j < L)
            tl.store(out + at[j] * dim + o_rc, totals[j].to(out.dtype.element_ty), mask=m_j)
    else:
        for j in tl.static_range(1 << LOG_K):
            tl.store(sums + at[j] * dim + o_rc, totals[j], mask=m_rc & (o_l + j < L))


@triton.jit
def compose(p, q, p_before, q_before, p_next, q_next, p_before_next, q_before_next):
    """v -> p v + q, and then v -> p_next v + q_next; the same without the last part of what is composed."""
    return p * p_next, p_next * q + q_next, p * p_before_next, p_before_next * q + q_before_next


@triton.jit
def carry(b_p, b_q, b_in, BD: tl.constexpr, LOG_R: tl.constexpr, REVERSE: tl.constexpr):
    """What enters every run, (C,), and what leaves the last one, (BD,).

    A run turns what enters it, v, into p v + q; b_in (BD,) enters the first one. With REVERSE the runs are passed from
    the last to the first.
    """
    R: tl.constexpr = 1 << LOG_R
    b_p = tl.reshape(b_p, (R, BD))
    b_q = tl.reshape(b_q, (R, BD))
    o_r = tl.arange(0, R)[:, None]
    b_entered = tl.broadcast_to(b_in[None, :], (R, BD))
    if REVERSE:
        # one run after the other, of which a thread gets all of its channel: Triton's reverse=True has been wrong where
        # the order of what is composed counts
        p = split_runs(tl.trans(b_p), LOG_R)
        q = split_runs(tl.trans(b_q), LOG_R)
        b_out = b_in
        for i in tl.static_range(R):
            b_entered = tl.where(o_r == R - 1 - i, b_out[None, :], b_entered)
            b_out = tl.reshape(p[R - 1 - i], (BD,)) * b_out + tl.reshape(q[R - 1 - i], (BD,))
    else:
        b_one = tl.full((R, BD), 1.0, tl.float32)
        b_p, b_q, b_pb, b_qb = tl.associative_scan((b_p, b_q, b_one, b_one - 1.0), 0, compose)
        b_out = tl.sum(tl.where(o_r == R - 1, b_p * b_in[None, :] + b_q, 0.0), 0)
        b_entered = b_pb * b_in[None, :] + b_qb
    return tl.reshape(b_entered, (R * BD,)), b_out


@triton.jit
def sum_channels(b_x, BD: tl.constexpr, LOG_R: tl.constexpr):
    """The sum over the channels of a run, at all of them: (C,) -> (C,)"""
    b_sum = tl.sum(tl.reshape(b_x, (1 << LOG_R, BD)), 1)
    return tl.reshape(tl.broadcast_to(b_sum[:, None], (1 << LOG_R, BD)), b_x.shape)


# ---- step sizes -----------------------------------------------------------------------------------------------------


@triton.jit
def raw_steps(p_proj, p_weight, o_t, m_c, fields, rank, BR: tl.constexpr, PRECISION: tl.constexpr):
    """The step sizes before bias and softplus, (BT, BD): rank numbers of the pixels o_t times weights (BR, BD)."""
    b_raw = tl.zeros((o_t.shape[0], m_c.shape[0]), tl.float32)
    for r in tl.range(0, rank, BR, num_stages=1):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < rank
        p_rank = p_proj + o_t[:, None] * fields + o_r[None, :]
        b_rank = tl.load(p_rank, mask=m_r[None, :], other=0.0).to(tl.float32)
        b_weight = tl.load(p_weight[None, :] + o_r[:, None], mask=m_r[:, None] & m_c[None, :], other=0.0)
        b_raw += tl.dot(b_rank, b_weight, input_precision=PRECISION)
    return b_raw
