"""SS2D's scan in Triton: one kernel forward, one backward, in which no route exists in memory.

A program walks routes of BD channels of one sample, tile after tile of BT tokens. A table tells the pixel at every
place of a route; as channels lie side by side at a pixel, gathering is coalesced on every route. A thread owns one
channel and a run of K consecutive tokens, R runs make a tile: within a run the recurrence is visited token by token, as
in the definition, in registers; runs are composed by a scan across warps. Step sizes come from a product on the tensor
cores (three products of tf32, exact to float32; float32 itself is multiplied in float32) and stay on the chip.

Bytes per pixel and channel, half precision, N = 1: the least are 4, x in and y out, and 2 * 4 F / D for proj. A program
visits x four times and adds the routes up in `sums`, float32, of which it reads back what it wrote last: routes are
walked in the order 0 2 1 3, so that each starts where the one before has ended. That is up to 8 + 26 bytes, of which
the second-level cache takes a part (all of it on small maps), against about 70 of the composition. Arithmetic weighs
more: compiled for sm_90 the forward has about 100 instructions per pixel, channel and route, so that it is bound by
them, not by memory.

Parallelism is samples times blocks of channels; if these are few the routes are walked by up to four programs (`ways`),
which leave a sum each. Nothing is added by atomics: sums over channels (the gradient of proj) leave as one partial per
block, those over tokens as one per sample, for torch to add. So the same call gives the same bits.

Between two tiles a program hands states on through memory, as it does its sums: every tile begins with a barrier.

Shapes: B batch, D channels, L = H W pixels, K = 4 routes, N state, F = rank + 2 N numbers of proj per route, S tiles;
of a program: BD channels, BT = R K tokens of a tile in R runs of K, C = R BD threads, BR ranks at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._common import route_bits
from ..api import STATE_CHUNK
from .triton_kernels import pixels_kernel, ss2d_scan_bwd_kernel, ss2d_scan_fwd_kernel

REGISTERS = {"forward": 168, "backward": 255}
"""Of a thread. 168 are three programs of four warps on a multiprocessor."""

MANY_PROGRAMS = 264
"""So many programs keep a large GPU busy, two per multiprocessor; routes are walked side by side to reach it."""

TOKENS_OF_RUN = {"forward": 4, "backward": 3, "interpreter": 2}
"""log2 of K: the backward has fewer registers left, the interpreter prefers few operations on much."""


def forward(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype) -> tuple[Tensor, Tensor]:
    """(out, states); shapes in api.py."""
    maps = _channels_last(x), proj.contiguous()
    parameters = [p.contiguous() for p in (dt_weight, A, D, dt_bias)]
    ways, grid, blocks = _plan(x, dt_weight.shape[2], A.shape[1], "forward")
    pixels = _pixels(x, scans)
    sums, out = _sums_and_map(x, ways, out_dtype)
    shape = (pixels.shape[1] // STATE_CHUNK["triton"] + 1, x.shape[0], 4, A.shape[1], x.shape[1])
    states = x.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        ss2d_scan_fwd_kernel[grid](
            *(pixels, *maps, *parameters, sums, out, states), *_sizes(x, dt_weight), 4 // ways, **blocks
        )
    return _like(x, out, out_dtype), states


def backward(dout, x, proj, dt_weight, A, D, dt_bias, states, scans) -> tuple[Tensor, ...]:
    """Gradients of (x, proj, dt_weight, A, D, dt_bias)."""
    maps = _channels_last(x), proj.contiguous()
    parameters = [p.contiguous() for p in (dt_weight, A, D, dt_bias)]
    (batch, dim), (rank, n_state) = x.shape[:2], (dt_weight.shape[2], A.shape[1])
    ways, grid, blocks = _plan(x, rank, n_state, "backward")
    sums, dx = _sums_and_map(x, ways, x.dtype)
    carried = x.new_empty((batch, 4, n_state, dim), dtype=torch.float32)
    dproj = x.new_empty((triton.cdiv(dim, blocks["BD"]), *proj.shape), dtype=torch.float32)
    partials = [x.new_empty((batch, *p.shape), dtype=torch.float32) for p in parameters]
    with torch.cuda.device_of(x):
        ss2d_scan_bwd_kernel[grid](
            *(_channels_last(dout), _pixels(x, scans), *maps, *parameters, states, carried, sums, dx, dproj, *partials),
            *_sizes(x, dt_weight),
            4 // ways,
            **blocks,
        )
    return _like(x, dx, x.dtype), dproj.sum(0).to(proj.dtype), *(p.sum(0) for p in partials)


def _channels_last(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H, W, D), contiguous"""
    return x.permute(0, 2, 3, 1).contiguous()


def _pixels(x: Tensor, scans: str) -> Tensor:
    """(K, S BT) int32, see pixels_kernel."""
    (height, width), tile = x.shape[2:], STATE_CHUNK["triton"]
    n_tiles = triton.cdiv(height * width, tile)
    pixels = torch.empty((4, n_tiles * tile), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        pixels_kernel[(4 * n_tiles,)](pixels, height, width, n_tiles * tile, *route_bits(scans), BT=tile, num_warps=1)
    return pixels


def _sums_and_map(x: Tensor, ways: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(ways, B, H, W, D) twice: float32 for the sums of all routes but a program's last, and what that one writes."""
    batch, dim, height, width = x.shape
    out = x.new_empty((ways, batch, height, width, dim), dtype=dtype if ways == 1 else torch.float32)
    return out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32), out


def _like(x: Tensor, ways: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of (ways, B, H, W, D), with the strides of x if it is dense."""
    y = (ways[0] if ways.shape[0] == 1 else ways.sum(0)).to(dtype).permute(0, 3, 1, 2)
    strides = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == strides else torch.empty_like(x, dtype=dtype).copy_(y)


def _sizes(x: Tensor, dt_weight: Tensor) -> tuple[int, ...]:
    batch, dim, height, width = x.shape
    return batch, dim, height * width, dt_weight.shape[2]


def _plan(x: Tensor, rank: int, n_state: int, direction: str) -> tuple[int, tuple[int], dict]:
    """Ways, grid and constants of the kernels, which know nothing of the size of the map."""
    batch, dim, height, width = x.shape
    log_k = TOKENS_OF_RUN[direction if x.is_cuda else "interpreter"]
    log_r = STATE_CHUNK["triton"].bit_length() - 1 - log_k
    block = 16 if dim <= 16 else 32
    programs, ways = batch * triton.cdiv(dim, block), 1
    while ways < 4 and programs * ways < MANY_PROGRAMS:
        ways *= 2
    image = height * width * max(dim, 4 * (rank + 2 * n_state))  # numbers of a sample, which offsets must reach
    constants = {
        "N": n_state,
        "BD": block,
        "BR": 16 if rank <= 16 else 32,
        "LOG_K": log_k,
        "LOG_R": log_r,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32x3",
        "OFFSET": tl.int32 if image < 2**31 else tl.int64,
        "num_warps": (block << log_r) // 32,
        "maxnreg": REGISTERS[direction],
        "num_stages": 1,  # loads must not be moved before the barrier of their tile
    }
    return ways, (programs * ways,), constants
