"""What is timed: for every operator, inputs at the stages of VMamba-T, the bytes that must move, and its baselines.

Shapes: B batch, D channels, S side of the map, L = S * S, K = 4 routes, N state, R rank of the step sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_ops import cross_merge, cross_scan, selective_scan, ss2d_scan

STAGES = ((192, 56), (384, 28), (768, 14), (1536, 7))  # (D, S) of ratio 2; half the channels for ratio 1
K = 4


@dataclass(frozen=True)
class Case:
    """An operator at one size: `run[name](*inputs)` are interchangeable ways to compute it, the first is the gate's."""

    operator: str
    size: str
    inputs: tuple[Tensor, ...]
    run: dict[str, Callable[..., Tensor]]
    bytes_forward: int
    bytes_backward: int


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _leaf(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def selective_scan_case(batch, dim, side, n_state, device, dtype, impls) -> Case:
    """The scan of all four routes, K * dim channels in K groups."""
    channels, length = K * dim, side * side
    maps = [_leaf(batch, channels, length, device=device, dtype=dtype) for _ in range(2)]
    projected = [_leaf(batch, K, n_state, length, device=device, dtype=dtype) for _ in range(2)]
    A = (-torch.rand(channels, n_state, device=device)).requires_grad_()
    vectors = [_leaf(channels, device=device, dtype=torch.float32) for _ in range(2)]
    inputs = (*maps, A, *projected, *vectors)

    forward = _bytes(*maps, *projected) + _bytes(maps[0])
    return Case(
        "selective_scan",
        f"B{batch} D{channels} L{length} N{n_state}",
        inputs,
        {i: functools.partial(selective_scan, delta_softplus=True, impl=i) for i in impls} | {"loop": step_loop},
        forward,
        forward + _bytes(*maps, *projected),
    )


def step_loop(u, delta, A, B, C, D, delta_bias):
    """The selective scan one token after the other: what one writes first."""
    delta = F.softplus(delta + delta_bias[:, None])
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for ut, dt, Bt, Ct in zip(u.unbind(2), delta.unbind(2), B.unbind(3), C.unbind(3), strict=True):
        h = torch.exp(dt[..., None] * A) * h + (dt * ut)[..., None] * Bt
        ys.append((h * Ct).sum(-1) + D * ut)
    return torch.stack(ys, 2)


def ss2d_scan_case(batch, dim, side, n_state, device, dtype, impls) -> Case:
    """The fused operator against the composition of the fastest other operators."""
    rank = -(-dim // 32)
    x = torch.randn(batch, dim, side, side, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    proj = _leaf(batch, side, side, K * (rank + 2 * n_state), device=device, dtype=dtype)
    weight = _leaf(K, dim, rank, device=device, dtype=torch.float32, scale=rank**-0.5)
    A = (-torch.rand(K * dim, n_state, device=device)).requires_grad_()
    vectors = [_leaf(K * dim, device=device, dtype=torch.float32) for _ in range(2)]

    forward = 2 * _bytes(x) + _bytes(proj)
    return Case(
        "ss2d_scan",
        f"B{batch} D{dim} {side}x{side} N{n_state} R{rank}",
        (x, proj, weight, A, *vectors),
        {"composition": composition} | {i: functools.partial(ss2d_scan, impl=i) for i in impls if i != "reference"},
        forward,
        3 * _bytes(x) + 2 * _bytes(proj),
    )


def composition(x, proj, weight, A, D, bias):
    """What the fused operator replaces, each part by its fastest implementation."""
    size, (rank, n_state) = x.shape[2:], (weight.shape[2], A.shape[1])
    routes = cross_scan(x)
    fields = cross_scan(proj.unflatten(3, (K, -1)).permute(0, 3, 4, 1, 2), one_by_one=True)
    dt, B, C = fields.split([rank, n_state, n_state], dim=2)
    delta = (weight.to(dt.dtype) @ dt).flatten(1, 2)
    y = selective_scan(routes.flatten(1, 2), delta, A, B, C, D, bias, delta_softplus=True)
    return cross_merge(y.unflatten(1, (K, -1)).unflatten(3, size)).unflatten(2, size)


def cross_case(name, batch, dim, side, device, dtype, impls) -> Case:
    """Scan or merge, channel-first."""
    operator = {"cross_scan": cross_scan, "cross_merge": cross_merge}[name]
    shape = (batch, dim, side, side) if name == "cross_scan" else (batch, K, dim, side, side)
    x = _leaf(*shape, device=device, dtype=dtype)
    moved = 5 * batch * dim * side * side * x.element_size()
    run = {impl: functools.partial(operator, impl=impl) for impl in impls}
    return Case(name, f"B{batch} C{dim} {side}x{side}", (x,), run, moved, moved)
