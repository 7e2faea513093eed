"""What _triton_route_kernels.py is made of: places on routes, tiles in runs, and how runs are composed."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import split_runs

# ---- routes ---------------------------------------------------------------------------------------------------------


@triton.jit
def place(dim, ways, BD: tl.constexpr):
    """(sample, way, block of channels) of this program, in 64 bits. The blocks of a sample are neighbours."""
    n_blocks = tl.cdiv(dim, BD)
    i = tl.program_id(0).to(tl.int64)
    return i // n_blocks // ways, i // n_blocks % ways, i % n_blocks


@triton.jit
def route(i, ROUTES: tl.constexpr):
    """Route number i as programs walk them, of four 0 2 1 3: where one ends the next one starts, in the cache."""
    return i % 2 * (ROUTES // 2) + i // 2


@triton.jit
def pixels_at(p_pixel, i_k, o_l, L, OFFSET: tl.constexpr):
    """The pixels at places o_l of route i_k, that of the last one past its end: from its table, or where there is none
    those of a sequence, forwards on route 0 and backwards on route 1."""
    if p_pixel is None:
        o_l = tl.minimum(o_l, L - 1)
        o_p = tl.where(i_k == 1, L - 1 - o_l, o_l)
    else:
        o_p = tl.load(p_pixel + o_l)
    return o_p.to(OFFSET)


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
def store_tokens(p, parts, at, dim, o_rc, o_l, L, m_rc, LOG_K: tl.constexpr):
    """K tiles (C,) to a map; what lies past the end of the route is left out."""
    for j in tl.static_range(1 << LOG_K):
        tl.store(p + at[j] * dim + o_rc, parts[j].to(p.dtype.element_ty), mask=m_rc & (o_l + j < L))


@triton.jit
def add_to_map(out, sums, parts, at, dim, o_rc, o_l, L, m_rc, i, n_routes, LOG_K: tl.constexpr):
    """Add the tile to what the routes before number i have left in sums; the last one of n_routes writes to out."""
    m_sums = m_rc & (i > 0)
    totals = ()
    for j in tl.static_range(1 << LOG_K):
        totals = totals + (parts[j] + tl.load(sums + at[j] * dim + o_rc, mask=m_sums, other=0.0),)
    if i == n_routes - 1:
        store_tokens(out, totals, at, dim, o_rc, o_l, L, m_rc, LOG_K)
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
def exchange(b_x, b_y, o_c, o_other):
    """Between channel c and another one, along axis 1: the lower one gets their sum of x, the upper one that of y."""
    m_upper = o_c > o_other
    b_sent = tl.where(m_upper, b_x, b_y)
    return tl.where(m_upper, b_y, b_x) + tl.gather(b_sent, o_other, 1)


@triton.jit
def sum_channels(parts, BD: tl.constexpr, LOG_K: tl.constexpr, LOG_R: tl.constexpr):
    """Sums over the channels of a run, of K tiles (C,) in one (C,): channel c of it has that of token c // (BD / K).

    An exchange between two lanes halves the tokens that a lane still holds, so that K sums cost little more than one.
    """
    R: tl.constexpr = 1 << LOG_R
    o_c = tl.broadcast_to(tl.arange(0, BD)[None, :], (R, BD))
    held = ()
    for j in tl.static_range(1 << LOG_K):
        held = held + (tl.reshape(parts[j], (R, BD)),)
    for i in tl.static_range(LOG_K):
        o_other = o_c ^ (BD >> (i + 1))
        kept = ()
        for j in tl.static_range(1 << (LOG_K - 1 - i)):
            kept = kept + (exchange(held[j], held[j + (1 << (LOG_K - 1 - i))], o_c, o_other),)
        held = kept
    b_sum = held[0]
    for i in tl.static_range(LOG_K, 5):
        if BD >> (i + 1) > 0:
            b_sum += tl.gather(b_sum, o_c ^ (BD >> (i + 1)), 1)
    return tl.reshape(b_sum, (R * BD,))


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
