"""What is timed: for every operator, inputs at the stages of a tiny model, the bytes that must move, and its baselines.

The bytes are a floor: the forward reads its inputs and writes its output once, the backward reads the inputs and the
gradient of the output and writes the gradients of the inputs. Parameters are small and not counted.

Shapes: B batch, D channels, S side of the map, L = S * S, K = 4 routes, N state, R rank of the step sizes, H heads of P
channels.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_ops import (
    bidirectional_scan,
    causal_conv1d,
    cross_merge,
    cross_scan,
    nc_ssd,
    selective_scan,
    ss2d_scan,
    ssd_chunk_scan,
)
from ssm_ops._library import OPERATORS, available
from ssm_ops.bidirectional_scan.impl.reference import composition as reversed_copies

STAGES = ((192, 56), (384, 28), (768, 14), (1536, 7))  # VMamba-T: (D, S) of ratio 2; half the channels for ratio 1
SSD_STAGES = ((2, 56), (4, 28), (8, 14), (16, 7))  # VSSD-T: (H, S)
VIM_SIZES = ((384, 197), (768, 197), (1536, 197), (384, 785))  # Vim-T, -S, -B, and -T with stride 8: (D, L)
K = 4
HEAD_DIM = SSD_STATE = 64


@dataclass(frozen=True)
class Case:
    """An operator at one size: `run[name](*inputs)` are interchangeable ways to compute it, the first is the gate's."""

    operator: str
    size: str
    inputs: tuple[Tensor, ...]
    run: dict[str, Callable[..., Tensor]]
    bytes_forward: int
    bytes_backward: int


def cases(
    operator: str, sizes: list[int], batches: list[int], states: list[int], device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """The cases of an operator, each made when it is asked for. `sizes`: which of its four, from 1."""
    impls = available(OPERATORS[operator], device.type, dtype)
    for batch in batches:
        for i in sizes:
            yield from MAKERS[operator](i - 1, batch, states, impls, device=device, dtype=dtype)


def _ways(operator: Callable[..., Tensor], impls: list[str], **options) -> dict[str, Callable[..., Tensor]]:
    return {impl: functools.partial(operator, impl=impl, **options) for impl in impls}


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _leaf(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def _decay(*shape: int, device: torch.device) -> Tensor:
    return (-torch.rand(shape, device=device)).requires_grad_()


# ---- scans ----------------------------------------------------------------------------------------------------------


def _selective_scan(size, batch, states, impls, **kind) -> Iterator[Case]:
    """The scan of all four routes, K * D channels in K groups."""
    dim, side = STAGES[size]
    for n_state in states:
        for channels in (K * dim, K * dim // 2):
            maps = [_leaf(batch, channels, side * side, **kind) for _ in range(2)]
            projected = [_leaf(batch, K, n_state, side * side, **kind) for _ in range(2)]
            vectors = [_leaf(channels, device=kind["device"], dtype=torch.float32) for _ in range(2)]
            A = _decay(channels, n_state, device=kind["device"])
            ways = _ways(selective_scan, impls, delta_softplus=True) | {"loop": step_loop}
            if kind["device"].type == "cuda" and importlib.util.find_spec("mamba_ssm") is not None:
                ways["mamba_ssm"] = mamba_ssm_scan
            forward = _bytes(*maps, *projected) + _bytes(maps[0])
            yield Case(
                "selective_scan",
                f"B{batch} D{channels} L{side * side} N{n_state}",
                (*maps, A, *projected, *vectors),
                ways,
                forward,
                forward + _bytes(*maps, *projected),
            )


def mamba_ssm_scan(u, delta, A, B, C, D, delta_bias):
    """The scan of the mamba_ssm package, if it is installed."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


def step_loop(u, delta, A, B, C, D, delta_bias):
    """The selective scan one token after the other: what one writes first."""
    delta = F.softplus(delta + delta_bias[:, None])
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for ut, dt, Bt, Ct in zip(u.unbind(2), delta.unbind(2), B.unbind(3), C.unbind(3), strict=True):
        h = torch.exp(dt[..., None] * A) * h + (dt * ut)[..., None] * Bt
        ys.append((h * Ct).sum(-1) + D * ut)
    return torch.stack(ys, 2)


def _ss2d_scan(size, batch, states, impls, **kind) -> Iterator[Case]:
    """The fused operator against the composition of the fastest other operators."""
    full_dim, side = STAGES[size]
    for n_state in states:
        for dim in (full_dim, full_dim // 2):
            rank = full_dim // 32  # a sixteenth of the width of the stage, whatever the ratio
            x = torch.randn(batch, dim, side, side, device=kind["device"]).to(kind["dtype"])
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            proj = _leaf(batch, side, side, K * (rank + 2 * n_state), **kind)
            weight = _leaf(K, dim, rank, device=kind["device"], dtype=torch.float32, scale=rank**-0.5)
            vectors = [_leaf(K * dim, device=kind["device"], dtype=torch.float32) for _ in range(2)]
            yield Case(
                "ss2d_scan",
                f"B{batch} D{dim} {side}x{side} N{n_state} R{rank}",
                (x, proj, weight, _decay(K * dim, n_state, device=kind["device"]), *vectors),
                {"composition": composition} | _ways(ss2d_scan, [i for i in impls if i != "reference"]),
                2 * _bytes(x) + _bytes(proj),
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


def _bidirectional_scan(size, batch, states, impls, **kind) -> Iterator[Case]:
    """The fused operator against the composition of the fastest scan with reversed copies."""
    dim, length = VIM_SIZES[size]
    rank = dim // 32  # a sixteenth of the width of the model
    for n_state in states:
        x, back = (_leaf(batch, length, dim, **kind) for _ in range(2))
        proj = _leaf(batch, length, 2 * (rank + 2 * n_state), **kind)
        weight = _leaf(2, dim, rank, device=kind["device"], dtype=torch.float32, scale=rank**-0.5)
        vectors = [_leaf(2 * dim, device=kind["device"], dtype=torch.float32) for _ in range(2)]
        ways = {"composition": functools.partial(reversed_copies, out_dtype=kind["dtype"], impl="auto")}
        yield Case(
            "bidirectional_scan",
            f"B{batch} L{length} D{dim} N{n_state} R{rank}",
            (x, back, proj, weight, _decay(2 * dim, n_state, device=kind["device"]), *vectors),
            ways | _ways(bidirectional_scan, [i for i in impls if i != "reference"]),
            3 * _bytes(x) + _bytes(proj),
            5 * _bytes(x) + 2 * _bytes(proj),
        )


def _cross(operator, size, batch, states, impls, **kind) -> Iterator[Case]:
    """Scan or merge, channel-first: one map, four routes."""
    dim, side = STAGES[size]
    shape = (batch, dim, side, side) if operator is cross_scan else (batch, K, dim, side, side)
    x = _leaf(*shape, **kind)
    moved = 5 * batch * dim * side * side * x.element_size()
    name = f"B{batch} C{dim} {side}x{side}"
    yield Case(operator.__name__, name, (x,), _ways(operator, impls), moved, moved)


# ---- SSD and convolution --------------------------------------------------------------------------------------------


def _ssd(operator, size, batch, states, impls, **kind) -> Iterator[Case]:
    """Causal or not, with one group."""
    heads, side = SSD_STAGES[size]
    length = side * side
    x, dt = _leaf(batch, length, heads, HEAD_DIM, **kind), _leaf(batch, length, heads, **kind)
    B, C = (_leaf(batch, length, 1, SSD_STATE, scale=SSD_STATE**-0.5, **kind) for _ in range(2))
    D, dt_bias = (_leaf(heads, device=kind["device"], dtype=torch.float32) for _ in range(2))

    def with_options(x, dt, A, B, C, D, dt_bias, impl):
        return operator(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, impl=impl)

    forward = _bytes(x, dt, B, C) + _bytes(x)
    yield Case(
        operator.__name__,
        f"B{batch} L{length} H{heads} P{HEAD_DIM} N{SSD_STATE}",
        (x, dt, _decay(heads, device=kind["device"]), B, C, D, dt_bias),
        _ways(with_options, impls),
        forward,
        forward + _bytes(x, dt, B, C),
    )


def _causal_conv1d(size, batch, states, impls, **kind) -> Iterator[Case]:
    """Four taps and SiLU, against PyTorch's depthwise convolution."""
    dim, length = VIM_SIZES[size]
    x, weight, bias = _leaf(batch, dim, length, **kind), _leaf(dim, 4, **kind), _leaf(dim, **kind)
    ways = _ways(causal_conv1d, impls, activation="silu") | {"conv1d": padded_conv1d}
    yield Case("causal_conv1d", f"B{batch} D{dim} L{length} K4", (x, weight, bias), ways, 2 * _bytes(x), 3 * _bytes(x))


def padded_conv1d(x, weight, bias):
    """The same from PyTorch's parts."""
    taps = weight.shape[1]
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=x.shape[1])[..., : x.shape[2]])


MAKERS = {
    "selective_scan": _selective_scan,
    "ss2d_scan": _ss2d_scan,
    "bidirectional_scan": _bidirectional_scan,
    "cross_scan": functools.partial(_cross, cross_scan),
    "cross_merge": functools.partial(_cross, cross_merge),
    "ssd_chunk_scan": functools.partial(_ssd, ssd_chunk_scan),
    "nc_ssd": functools.partial(_ssd, nc_ssd),
    "causal_conv1d": _causal_conv1d,
}
"""By operator: f(size, batch, states, impls, device=, dtype=) yields the cases of one size, counted from 0."""
