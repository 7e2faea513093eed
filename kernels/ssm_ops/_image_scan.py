"""Calls of the compiled scans over an image (csrc/cpu/ss2d_scan.cpp), for the operators that are made of them.

The library takes channels-last maps of float32, float16 or bfloat16 whose channels fill whole blocks of 16; others are
copied and filled up here.

Shapes: B batch, D channels, L pixels, K routes, N state, R rank of the step sizes.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._interface import BLOCK, CPU_CHUNK, Buffer, Ss2dArguments
from ._library import SINGLE_AND_HALF
from ._native import call

STATE_CHUNK = CPU_CHUNK
"""Pixels of a route between two saved states."""


class ImageScan:
    """One call: the inputs in the layout of the library, kept alive while it runs.

    Args:
        maps: (B, L, D), any strides: one that all routes read, or one per route.
        proj: (B, L, K * (R + 2N)).
        dt_weight, A, D, bias: (K, D, R), (K, D, N), (K, D), (K, D).
        order: (K, L) int32, the pixel at every place of every route.
    """

    def __init__(self, maps: list[Tensor], proj, dt_weight, A, D, bias, order: Tensor):
        self.batch, self.length, dim = maps[0].shape
        self.missing = -dim % BLOCK
        self.dim, self.blocks = dim + self.missing, -(-dim // BLOCK)
        self.state, self.rank = A.shape[2], dt_weight.shape[2]
        self.routes = A.shape[0]
        self.maps = [self.as_map(x) for x in maps]
        self.inputs = {
            "proj": proj.contiguous(),
            "dt_weight": _fill_channels(dt_weight, self.missing),
            "A": _fill_channels(A, self.missing),
            "D": _fill_channels(D, self.missing),
            "bias": _fill_channels(bias, self.missing),
            "order": order,
        }

    def as_map(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D + missing), contiguous; a copy only where x is something else."""
        return F.pad(x, (0, self.missing)) if self.missing else x.contiguous()

    def forward(self, out_dtype: torch.dtype, keep_states: bool) -> tuple[Tensor, Tensor]:
        """The sum of all routes (B, L, D) and, if they are to be kept, the states before every chunk
        (S + 1, B, K, N, D) in float32."""
        own = self.dim - self.missing
        dtype = out_dtype if out_dtype in SINGLE_AND_HALF else torch.float32
        y = self.maps[0].new_empty((self.batch, self.length, self.dim), dtype=dtype)
        parts = _forward_parts(self.batch, self.blocks, torch.get_num_threads())
        if not keep_states:
            self._run("forward", parts, y=y)
            return (y[..., :own] if self.missing else y).to(out_dtype), self._empty(0)
        chunks = -(-self.length // STATE_CHUNK)
        states = self._empty(chunks + 1, self.batch, self.routes, self.state, self.dim)
        self._run("forward", parts, y=y, states=states)
        states[chunks] = 0  # not written by the library, nor read: the same call gives the same bits
        return y[..., :own].to(out_dtype), states[..., :own].contiguous()

    def backward(self, dy: Tensor, states: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of maps, proj, dt_weight, A, D, bias, in float32."""
        parts = _backward_parts(self.batch, self.blocks)
        dx = [self._empty(self.batch, self.length, self.dim) for _ in self.maps]
        dproj = self._empty(parts, *self.inputs["proj"].shape)
        # by channel: (B, K, D, *)
        grads = {
            name: self._empty(self.batch, self.routes, self.dim, *last)
            for name, last in (("ddt_weight", (self.rank,)), ("dA", (self.state,)), ("dD", ()), ("dbias", ()))
        }
        states = F.pad(states, (0, self.missing)) if self.missing else states.contiguous()
        more = {"dy": self.as_map(dy), "states": states, "dproj": dproj, **grads}
        self._run("backward", parts, dx, **more)
        own = self.dim - self.missing
        by_channel = (_add(g)[:, :own].contiguous() for g in grads.values())
        return [d[..., :own] for d in dx], _add(dproj), *by_channel

    def _empty(self, *shape: int) -> Tensor:
        return self.maps[0].new_empty(shape, dtype=torch.float32)

    def _run(self, direction: str, parts: int, dx: list[Tensor] | None = None, **tensors: Tensor) -> None:
        a = Ss2dArguments()
        for route in range(self.routes):
            i = min(route, len(self.maps) - 1)
            a.x[route] = Buffer.of(self.maps[i])
            if dx:
                a.dx[route] = Buffer.of(dx[i])
        for name, tensor in (self.inputs | tensors).items():
            setattr(a, name, Buffer.of(tensor))
        a.batch, a.dim, a.length, a.state, a.rank = self.batch, self.dim, self.length, self.state, self.rank
        a.parts, a.routes, a.threads = parts, self.routes, torch.get_num_threads()
        call("cpu", f"ss2d_scan_{direction}", a)


def _fill_channels(x: Tensor, missing: int) -> Tensor:
    """(K, D, *) -> (K, D + missing, *), contiguous"""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x.contiguous()


@functools.lru_cache(maxsize=256)
def _forward_parts(batch: int, blocks: int, threads: int) -> int:
    """How many parts the channels are cut into: as few as keep all threads equally busy. The results do not tell."""

    def longest(parts: int) -> int:
        return -(-batch * parts // threads) * -(-blocks // parts)  # tasks of a thread, times blocks of a task

    return min(range(1, min(blocks, 2 * threads) + 1), key=longest)


def _backward_parts(batch: int, blocks: int) -> int:
    """How many parts give gradients of `proj`, to be added: a power of two that keeps 16 threads busy, each part of at
    least two blocks. It does not depend on the number of threads: the same call gives the same bits everywhere."""
    parts = 1
    while 4 * parts <= blocks and parts * batch < 16:
        parts *= 2
    return parts


def _add(parts: Tensor) -> Tensor:
    """The sum over the first dimension."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
