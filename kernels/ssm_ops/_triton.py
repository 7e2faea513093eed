"""What the Triton kernels of several operators share: step sizes, and tiles cut into runs of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


# ---- step size ------------------------------------------------------------------------------------------------------


@triton.jit
def log1p(b_v):
    """log(1 + v) for v in [0, 1], to a relative error of 1.4e-7 however small v is."""
    # minimax polynomial of log1p(v) / v on [0, 1]; no logarithm of the hardware is accurate near 1
    b_p = -0.0032440247 * b_v + 0.0198514592
    b_p = b_p * b_v - 0.0569595285
    b_p = b_p * b_v + 0.106036544
    b_p = b_p * b_v - 0.153055921
    b_p = b_p * b_v + 0.196759388
    b_p = b_p * b_v - 0.249541342
    b_p = b_p * b_v + 0.333299637
    b_p = b_p * b_v - 0.499999017
    return (b_p * b_v + 1.0) * b_v


@triton.jit
def step_size(b_raw, m_tile, SOFTPLUS: tl.constexpr):
    """dt of raw = delta + bias, and d dt / d raw. Outside of the map dt = 0, which leaves the state as it is."""
    if SOFTPLUS:
        b_v = tl.exp2(-tl.abs(b_raw) * LOG2E)
        b_log = log1p(b_v)
        b_dt = tl.maximum(b_raw, 0.0) + b_log  # above 20 the identity to the last bit, without saying so
        # sigmoid(raw); exp(-log(1 + v)) is cheaper than a division by 1 + v
        b_slope = tl.where(b_raw > 0.0, 1.0, b_v) * tl.exp2(-b_log * LOG2E)
    else:
        b_dt = b_raw
        b_slope = tl.full(b_raw.shape, 1.0, b_raw.dtype)
    return tl.where(m_tile, b_dt, 0.0), b_slope


# ---- a tile in runs: R runs of K tokens -----------------------------------------------------------------------------


@triton.jit
def halve(b_x):
    """(BD, 2 M) -> its even and its odd columns, (BD, M) each"""
    return tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1] // 2, 2)))


@triton.jit
def interleave(b_even, b_odd):
    """The inverse of `halve`."""
    return tl.reshape(tl.join(b_even, b_odd), (b_even.shape[0], 2 * b_even.shape[1]))


@triton.jit
def split_runs(b_x, LOG_K: tl.constexpr):
    """(BD, BT) -> K tiles (BD, R), of which tile j holds token j of every run. Moves no data: it renames registers."""
    parts = (b_x,)
    for i in tl.static_range(LOG_K):
        even = ()
        odd = ()
        for j in tl.static_range(1 << i):
            b_even, b_odd = halve(parts[j])
            even = even + (b_even,)
            odd = odd + (b_odd,)
        parts = even + odd
    return parts


@triton.jit
def join_runs(parts, LOG_K: tl.constexpr):
    """The inverse of `split_runs`."""
    for i in tl.static_range(LOG_K):
        joined = ()
        for j in tl.static_range(1 << (LOG_K - 1 - i)):
            joined = joined + (interleave(parts[j], parts[j + (1 << (LOG_K - 1 - i))]),)
        parts = joined
    return parts[0]
