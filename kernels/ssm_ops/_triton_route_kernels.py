"""The Triton kernels of scans along routes. How they work, and what the shapes are called: _triton_routes.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import LOG2E, step_size
from ._triton_route_tiles import (
    add_to_map,
    carry,
    from_runs,
    pixels_at,
    place,
    raw_steps,
    route,
    store_tokens,
    sum_channels,
    to_runs,
)

SIZES = ["batch", "dim", "L", "rank", "n_routes"]


@triton.jit(do_not_specialize=[*SIZES, "slots"])
def route_scan_fwd_kernel(
    pixels,  # (K, S BT) or None
    x,  # (B, L, D)
    x_other,  # (B, L, D) of route 1, or None: all routes read x
    proj,  # (B, L, K, F), F = rank + 2 N
    dt_weight,  # (K, D, rank)
    A,  # (K, D, N)
    D,  # (K, D)
    dt_bias,  # (K, D)
    sums,  # (ways, B, L, D): y of the routes before the last one
    out,  # (ways, B, L, D)
    states,  # (S + 1, B, K, N, D), or 2 in place of S + 1
    batch,
    dim,
    L,
    rank,
    n_routes,  # of a program
    slots,  # bits of a tile's number that tell where its state is kept: all, or the last one alone
    N: tl.constexpr,
    ROUTES: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    LOG_K: tl.constexpr,
    LOG_R: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
):
    BT: tl.constexpr = 1 << (LOG_K + LOG_R)
    K: tl.constexpr = 1 << LOG_K
    fields = rank + 2 * N
    n_places = tl.cdiv(L, BT) * BT
    i_b, i_w, i_c = place(dim, ROUTES // n_routes, BD)
    o_c = i_c * BD + tl.arange(0, BD)
    m_c = o_c < dim
    o_row = tl.arange(0, BD << LOG_R)
    o_run = o_row // BD << LOG_K
    o_rc = i_c * BD + o_row % BD
    m_rc = o_rc < dim
    o_rc = tl.minimum(o_rc, dim - 1)
    sums += (i_w * batch + i_b) * L * dim
    out += (i_w * batch + i_b) * L * dim
    state_s = batch.to(tl.int64) * ROUTES * N * dim

    for i in range(n_routes):
        i_k = route(i_w.to(tl.int32) * n_routes + i, ROUTES)
        p_pixel = None if pixels is None else pixels + i_k.to(tl.int64) * n_places
        p_x = x + i_b * L * dim
        if x_other is not None:  # noqa: SIM102  this is decided when the kernel is compiled
            if i_k == 1:
                p_x = x_other + i_b * L * dim
        p_proj = proj + (i_b * L * ROUTES + i_k) * fields
        p_state = states + (i_b * ROUTES + i_k) * N * dim + o_c
        tl.store(p_state, tl.zeros((BD,), tl.float32), mask=m_c)
        for n in range(1, N):
            tl.store(p_state + n * dim, tl.zeros((BD,), tl.float32), mask=m_c)
        b_D = tl.load(D + i_k * dim + o_rc)
        b_bias = tl.load(dt_bias + i_k * dim + o_rc)
        for i_t in range(0, n_places // BT):
            tl.debug_barrier()  # what other threads of the program have written: states, sums
            before = (i_t & slots) * state_s
            after = ((i_t + 1) & slots) * state_s
            o_t = pixels_at(p_pixel, i_k, i_t * BT + tl.arange(0, BT), L, OFFSET)
            p_weight = dt_weight + (i_k * dim + o_c) * rank
            b_raw = raw_steps(p_proj, p_weight, o_t, m_c, fields * ROUTES, rank, BR, PRECISION)
            o_l = i_t * BT + o_run
            raw = to_runs(b_raw, BD, LOG_K, LOG_R)
            dt = ()
            dtx = ()
            y = ()
            at = ()
            for j in tl.static_range(K):
                at = at + (pixels_at(p_pixel, i_k, o_l + j, L, OFFSET),)
            for j in tl.static_range(K):
                b_x = tl.load(p_x + at[j] * dim + o_rc).to(tl.float32)
                b_dt, _ = step_size(raw[j] + b_bias, o_l + j < L, True)
                dt = dt + (b_dt,)
                dtx = dtx + (b_dt * b_x,)
                y = y + (b_D * b_x,)
            for n in range(N):
                b_h = tl.load(p_state + before + n * dim, mask=m_c, other=0.0)
                b_A = tl.load(A + (i_k * dim + o_rc) * N + n) * LOG2E
                b_p = tl.full((BD << LOG_R,), 1.0, tl.float32)
                b_q = tl.zeros((BD << LOG_R,), tl.float32)
                a = ()
                v = ()
                for j in tl.static_range(K):
                    p_B = p_proj + at[j] * (fields * ROUTES) + rank + n
                    b_B = tl.load(p_B).to(tl.float32)
                    a = a + (tl.exp2(dt[j] * b_A),)
                    v = v + (dtx[j] * b_B,)
                    b_p = b_p * a[j]
                    b_q = b_q * a[j] + v[j]
                b_now, b_last = carry(b_p, b_q, b_h, BD, LOG_R, False)
                added = ()
                for j in tl.static_range(K):
                    p_C = p_proj + at[j] * (fields * ROUTES) + rank + N + n
                    b_now = b_now * a[j] + v[j]
                    added = added + (y[j] + b_now * tl.load(p_C).to(tl.float32),)
                y = added
                tl.store(p_state + after + n * dim, b_last, mask=m_c)
            add_to_map(out, sums, y, at, dim, o_rc, o_l, L, m_rc, i, n_routes, LOG_K)


@triton.jit(do_not_specialize=SIZES)
def route_scan_bwd_kernel(
    dout,  # (B, L, D)
    pixels,  # (K, S BT) or None
    x,  # (B, L, D)
    x_other,  # (B, L, D) of route 1, or None
    proj,  # (B, L, K, F)
    dt_weight,  # (K, D, rank)
    A,  # (K, D, N)
    D,  # (K, D)
    dt_bias,  # (K, D)
    states,  # (S + 1, B, K, N, D)
    carried,  # (B, K, N, D): exp(dt A) lambda of the first token of the tile after
    sums,  # (ways, B, L, D): dx of the routes before the last one; None where every route has a map of its own
    dx,  # (ways, B, L, D), or (B, L, D) of route 0
    dx_other,  # (B, L, D) of route 1, or None
    dproj,  # (blocks, B, L, K, F)
    ddt_weight,  # (B, K, D, rank)
    dA,  # (B, K, D, N)
    dD,  # (B, K, D)
    dbias,  # (B, K, D)
    batch,
    dim,
    L,
    rank,
    n_routes,  # of a program
    N: tl.constexpr,
    ROUTES: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    LOG_K: tl.constexpr,
    LOG_R: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
):
    K: tl.constexpr = 1 << LOG_K
    R: tl.constexpr = 1 << LOG_R
    BT: tl.constexpr = R * K
    fields = rank + 2 * N
    n_tiles = tl.cdiv(L, BT)
    i_b, i_w, i_c = place(dim, ROUTES // n_routes, BD)
    o_c = i_c * BD + tl.arange(0, BD)
    m_c = o_c < dim
    o_row = tl.arange(0, R * BD)
    o_run = o_row // BD * K
    o_rc = i_c * BD + o_row % BD
    m_rc = o_rc < dim
    o_rc = tl.minimum(o_rc, dim - 1)
    o_summed = o_row % BD // (BD // K)  # the token whose sum over the channels this thread gets
    m_summed = o_row % (BD // K) == 0
    dout += i_b * L * dim
    if sums is not None:
        p_sums = sums + (i_w * batch + i_b) * L * dim

    for i in range(n_routes):
        i_k = route(i_w.to(tl.int32) * n_routes + i, ROUTES)
        i_bk = i_b * ROUTES + i_k
        p_pixel = None if pixels is None else pixels + i_k.to(tl.int64) * n_tiles * BT
        p_x = x + i_b * L * dim
        p_dx = dx + (i_w * batch + i_b) * L * dim
        if x_other is not None:
            p_dx = dx + i_b * L * dim
            if i_k == 1:
                p_x = x_other + i_b * L * dim
                p_dx = dx_other + i_b * L * dim
        p_proj = proj + (i_b * L * ROUTES + i_k) * fields
        p_dproj = dproj + ((i_c * batch + i_b) * L * ROUTES + i_k) * fields
        p_weight = dt_weight + (i_k * dim + o_c) * rank
        p_dweight = ddt_weight + (i_bk * dim + o_c) * rank
        b_D = tl.load(D + i_k * dim + o_rc)
        b_bias = tl.load(dt_bias + i_k * dim + o_rc)
        b_dD = tl.zeros((R * BD,), tl.float32)
        b_dbias = tl.zeros((R * BD,), tl.float32)
        for i_t in range(n_tiles - 1, -1, -1):
            tl.debug_barrier()  # what other threads of the program have written: carried, sums and sums over tiles
            last_tile = i_t == n_tiles - 1
            o_l = i_t * BT + o_run
            o_t = pixels_at(p_pixel, i_k, i_t * BT + tl.arange(0, BT), L, OFFSET)
            raw = to_runs(raw_steps(p_proj, p_weight, o_t, m_c, fields * ROUTES, rank, BR, PRECISION), BD, LOG_K, LOG_R)
            at = ()
            for j in tl.static_range(K):
                at = at + (pixels_at(p_pixel, i_k, o_l + j, L, OFFSET),)
            p_summed = p_dproj + pixels_at(p_pixel, i_k, o_l + o_summed, L, OFFSET) * (fields * ROUTES)
            m_token = m_summed & (o_l + o_summed < L)
            u = ()
            dy = ()
            dt = ()
            slope = ()
            for j in tl.static_range(K):
                m_j = m_rc & (o_l + j < L)
                b_u = tl.load(p_x + at[j] * dim + o_rc).to(tl.float32)
                b_dy = tl.load(dout + at[j] * dim + o_rc).to(tl.float32)
                b_dt, b_slope = step_size(raw[j] + b_bias, m_j, True)
                u = u + (tl.where(m_j, b_u, 0.0),)
                dy = dy + (tl.where(m_j, b_dy, 0.0),)
                dt = dt + (b_dt,)
                slope = slope + (b_slope,)

            lamB = ()  # sum over the states of lambda B
            decay = ()  # gradient of dt through exp(dt A)
            for j in tl.static_range(K):  # noqa: B007
                lamB = lamB + (tl.zeros((R * BD,), tl.float32),)
                decay = decay + (tl.zeros((R * BD,), tl.float32),)
            for n in range(N):
                b_h = tl.load(
                    states + (((i_t * batch.to(tl.int64)) * ROUTES + i_bk) * N + n) * dim + o_c, mask=m_c, other=0.0
                )
                p_carried = carried + (i_bk * N + n) * dim + o_c
                b_w = tl.load(p_carried, mask=m_c & (not last_tile), other=0.0)
                b_A = tl.load(A + (i_k * dim + o_rc) * N + n)
                b_p = tl.full((R * BD,), 1.0, tl.float32)
                b_q = tl.zeros((R * BD,), tl.float32)
                a = ()
                v = ()
                B = ()
                g = ()
                for j in tl.static_range(K):
                    p_B = p_proj + at[j] * (fields * ROUTES) + rank + n
                    B = B + (tl.load(p_B).to(tl.float32),)
                    g = g + (tl.load(p_B + N).to(tl.float32) * dy[j],)
                    a = a + (tl.exp2(dt[j] * (b_A * LOG2E)),)
                    v = v + (dt[j] * u[j] * B[j],)
                    b_p = b_p * a[j]
                    b_q = b_q * a[j] + v[j]
                b_now, _ = carry(b_p, b_q, b_h, BD, LOG_R, False)
                b_q = tl.zeros((R * BD,), tl.float32)
                for j in tl.static_range(K):
                    b_q = (b_q + g[K - 1 - j]) * a[K - 1 - j]
                b_w, b_first = carry(b_p, b_q, b_w, BD, LOG_R, True)
                tl.store(p_carried, b_first, mask=m_c)

                left = ()  # a_t h_{t-1}
                dC = ()
                for j in tl.static_range(K):
                    left = left + (a[j] * b_now,)
                    b_now = left[j] + v[j]
                    dC = dC + (b_now * dy[j],)
                tl.store(p_summed + rank + N + n, sum_channels(dC, BD, LOG_K, LOG_R), mask=m_token)
                lam = ()
                for j in tl.static_range(K):
                    b_lam = g[K - 1 - j] + b_w
                    b_w = a[K - 1 - j] * b_lam
                    lam = (b_lam,) + lam
                lamBs = ()
                decays = ()
                dB = ()
                b_dA = tl.zeros((R * BD,), tl.float32)
                for j in tl.static_range(K):
                    b_decay = lam[j] * left[j]
                    b_dA += b_decay * dt[j]
                    decays = decays + (decay[j] + b_decay * b_A,)
                    lamBs = lamBs + (lamB[j] + lam[j] * B[j],)
                    dB = dB + (lam[j] * dt[j] * u[j],)
                tl.store(p_summed + rank + n, sum_channels(dB, BD, LOG_K, LOG_R), mask=m_token)
                lamB = lamBs
                decay = decays
                p_dA = dA + (i_bk * dim + o_c) * N + n
                b_sum = tl.load(p_dA, mask=m_c & (not last_tile), other=0.0)
                tl.store(p_dA, b_sum + tl.sum(tl.reshape(b_dA, (R, BD)), 0), mask=m_c)

            du = ()
            draw = ()
            for j in tl.static_range(K):
                du = du + (lamB[j] * dt[j] + b_D * dy[j],)
                draw = draw + ((lamB[j] * u[j] + decay[j]) * slope[j],)
                b_dD += dy[j] * u[j]
                b_dbias += draw[j]
            if sums is None:
                store_tokens(p_dx, du, at, dim, o_rc, o_l, L, m_rc, LOG_K)
            else:
                add_to_map(p_dx, p_sums, du, at, dim, o_rc, o_l, L, m_rc, i, n_routes, LOG_K)

            b_draw = from_runs(draw, BD, LOG_K, LOG_R)
            m_t = i_t * BT + tl.arange(0, BT) < L
            for r in tl.range(0, rank, BR, num_stages=1):
                o_r = r + tl.arange(0, BR)
                m_r = o_r < rank
                m_weight = m_r[:, None] & m_c[None, :]
                b_rank = tl.load(p_proj + o_t[:, None] * (fields * ROUTES) + o_r[None, :], mask=m_r[None, :], other=0.0)
                b_weight = tl.load(p_weight[None, :] + o_r[:, None], mask=m_weight, other=0.0)
                b_drank = tl.dot(b_draw, tl.trans(b_weight), input_precision=PRECISION)
                p_drank = p_dproj + o_t[:, None] * (fields * ROUTES) + o_r[None, :]
                tl.store(p_drank, b_drank, mask=m_t[:, None] & m_r[None, :])
                b_sum = tl.load(p_dweight[None, :] + o_r[:, None], mask=m_weight & (not last_tile), other=0.0)
                b_sum += tl.dot(tl.trans(b_rank.to(tl.float32)), b_draw, input_precision=PRECISION)
                tl.store(p_dweight[None, :] + o_r[:, None], b_sum, mask=m_weight)

        o_bkc = i_bk * dim + o_c
        tl.store(dD + o_bkc, tl.sum(tl.reshape(b_dD, (R, BD)), 0), mask=m_c)
        tl.store(dbias + o_bkc, tl.sum(tl.reshape(b_dbias, (R, BD)), 0), mask=m_c)
