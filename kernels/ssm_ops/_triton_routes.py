"""Scans along several routes and their sum in Triton: one kernel forward, one backward, for the operators made of them.

A program walks routes of BD channels of one sample, tile after tile of BT tokens; no route exists in memory. A table
tells the pixel at every place of a route; without one there are two routes, a sequence forwards and, over a map of its
own, backwards. As channels lie side by side at a pixel, gathering is coalesced on every route. A thread owns one
channel and a run of RUN consecutive tokens, R runs make a tile: within a run the recurrence is visited token by token,
as in the definition, in registers; runs are composed by a scan across warps. Step sizes come from a product on the
tensor cores (three products of tf32, exact to float32; float32 itself is multiplied in float32) and stay on the chip.

Bytes per pixel and channel, e those of an element, M maps that are read (1 or K), F numbers of proj per route, S states
kept for a backward (one before every BT tokens):

    forward    (M + 1) e + K F e / D      (+ 4 K N / BT with states)
    backward   (2 M + 1) e + 2 K F e / D  (+ 4 K N / BT)

are the least. In truth a program visits its maps once per route and adds the routes up in `sums`, float32, of which it
reads back what it wrote last: where one route ends the next one starts. The second-level cache takes a part of that
(all of it on small maps). The gradient of proj leaves as one partial in float32 per block of channels, 4 K F / BD.

Parallelism is samples times blocks of channels; if these are few the routes are walked by up to K programs (`ways`),
which leave a sum each. Backwards over maps of their own they always are, for there is nothing to be summed. Nothing is
added by atomics: sums over channels (the gradient of proj) leave as one partial per block, those over tokens as one per
sample, for torch to add. So the same call gives the same bits.

Between two tiles a program hands states on through memory, as it does its sums: every tile begins with a barrier.
Where no backward follows, two of them take turns.

Shapes: B batch, D channels, L pixels, K routes, N state, F = rank + 2 N numbers of proj per route, S tiles;
of a program: BD channels, BT = R RUN tokens of a tile, C = R BD threads, BR ranks at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_CHUNK as TILE
from ._common import check_states
from ._triton_route_kernels import route_scan_bwd_kernel, route_scan_fwd_kernel

REGISTERS = {"forward": 168, "backward": 255}
"""Of a thread. 168 are three programs of four warps on a multiprocessor."""

MANY_PROGRAMS = 264
"""So many programs keep a large GPU busy, two per multiprocessor; routes are walked side by side to reach it."""

RANKS_AT_A_TIME = 16
"""The least that a product of Triton's takes. With 32 the backward kept up to 512 bytes of a thread in memory."""

TOKENS_OF_RUN = {"forward": 4, "backward": 3, "interpreter": 2}
"""log2 of RUN: the backward has fewer registers left, the interpreter prefers few operations on much."""


def forward(maps, proj, dt_weight, A, D, bias, pixels, out_dtype, keep_states) -> tuple[Tensor, Tensor]:
    """The sum of all routes, (B, L, D), and the states before every tile and after the last, (S + 1, B, K, N, D), which
    have no elements without `keep_states`.

    Args:
        maps: (B, L, D), contiguous: one that all routes read, or one for each of two.
        proj: (B, L, K * F) in any shape and any strides, as the parameters, which are float32:
        dt_weight, A, D, bias: (K, D, rank), (K * D, N), (K * D), (K * D).
        pixels: (K, S * BT) int32, the pixel at every place of every route, or None, see above.
    """
    x, (routes, dim, rank), n_state = maps[0], dt_weight.shape, A.shape[1]
    batch, length, _ = x.shape
    ways, grid, constants = plan(x, routes, rank, n_state, "forward")
    sums, out = _sums_and_map(x, ways, out_dtype)
    kept = triton.cdiv(length, TILE) + 1 if keep_states else 2
    states = x.new_empty((kept, batch, routes, n_state, dim), dtype=torch.float32)
    given = (pixels, *_two(maps), *(t.contiguous() for t in (proj, dt_weight, A, D, bias)))
    with torch.cuda.device_of(x):
        route_scan_fwd_kernel[grid](
            *(*given, sums, out, states),
            batch,
            dim,
            length,
            rank,
            routes // ways,
            -1 if keep_states else 1,
            **constants,
        )
    return _sum(out).to(out_dtype), states if keep_states else states.new_empty(0)


def backward(dout, maps, proj, dt_weight, A, D, bias, pixels, states, name) -> tuple[list[Tensor], ...]:
    """Gradients of (the maps, proj, dt_weight, A, D, bias). `dout` (B, L, D) is contiguous; `name` of the operator."""
    x, (routes, dim, rank), n_state = maps[0], dt_weight.shape, A.shape[1]
    batch, length, _ = x.shape
    check_states(name, states, (triton.cdiv(length, TILE) + 1, batch, routes, n_state, dim))
    ways, grid, constants = plan(x, routes, rank, n_state, "backward", ways=routes if len(maps) > 1 else None)
    if len(maps) > 1:
        sums, dx = None, [torch.empty_like(x) for x in maps]
    else:
        sums, *dx = _sums_and_map(x, ways, x.dtype)
    carried = x.new_empty((batch, routes, n_state, dim), dtype=torch.float32)
    parameters = [t.contiguous() for t in (dt_weight, A, D, bias)]
    dproj = x.new_empty((triton.cdiv(dim, constants["BD"]), *proj.shape), dtype=torch.float32)
    partials = [x.new_empty((batch, *t.shape), dtype=torch.float32) for t in parameters]
    given = (dout, pixels, *_two(maps), proj.contiguous(), *parameters, states.contiguous())
    with torch.cuda.device_of(x):
        route_scan_bwd_kernel[grid](
            *(*given, carried, sums, *_two(dx), dproj, *partials), batch, dim, length, rank, routes // ways, **constants
        )
    dx = dx if len(maps) > 1 else [_sum(dx[0]).to(x.dtype)]
    return dx, dproj.sum(0).to(proj.dtype), *(p.sum(0) for p in partials)


def _two(maps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return (*maps, None)[:2]


def _sums_and_map(x: Tensor, ways: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(ways, B, L, D) twice: float32 for the sums of all routes but a program's last, and what that one writes."""
    out = x.new_empty((ways, *x.shape), dtype=dtype if ways == 1 else torch.float32)
    return out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32), out


def _sum(ways: Tensor) -> Tensor:
    return ways[0] if ways.shape[0] == 1 else ways.sum(0)


def plan(
    x: Tensor, routes: int, rank: int, n_state: int, direction: str, ways: int | None = None
) -> tuple[int, tuple[int], dict]:
    """Ways (as given, or as many as it takes), grid and constants of the kernels, which know nothing of the length."""
    batch, length, dim = x.shape
    log_k = TOKENS_OF_RUN[direction if x.is_cuda else "interpreter"]
    log_r = TILE.bit_length() - 1 - log_k
    block = 16 if dim <= 16 else 32
    programs = batch * triton.cdiv(dim, block)
    if ways is None:
        ways = 1
        while ways < routes and programs * ways < MANY_PROGRAMS:
            ways *= 2
    sample = length * max(dim, routes * (rank + 2 * n_state))  # numbers of a sample, which offsets must reach
    constants = {
        "N": n_state,
        "ROUTES": routes,
        "BD": block,
        "BR": RANKS_AT_A_TIME,
        "LOG_K": log_k,
        "LOG_R": log_r,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32x3",
        "OFFSET": tl.int32 if sample < 2**31 else tl.int64,
        "num_warps": (block << log_r) // 32,
        "maxnreg": REGISTERS[direction],
        "num_stages": 1,  # loads must not be moved before the barrier of their tile
    }
    return ways, (programs * ways,), constants
