"""Cross scan and cross merge: the routes along which VMamba reads an image, and the way back.

Liu et al. 2024, "VMamba", section 4.2 and figure 3 (https://arxiv.org/abs/2401.10166).

Shapes: B batch, C channels, H W map, L = H*W, K = 4 routes.
Routes (`scans`, a name or upstream's number):
    0 "cross2d"  rows, columns, rows backwards, columns backwards
    1 "unidi"    rows four times
    2 "bidi"     rows, rows, rows backwards, rows backwards
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import below_autograd, differentiate
from .._common import FLOATING, SCANS
from .._library import declare, register, resolve
from .impl import reference


def cross_scan(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: str | int = "cross2d",
    *,
    impl: str = "auto",
) -> Tensor:
    """Read a map along four routes.

    Args:
        x: (B, C, H, W), or (B, H, W, C) if not `in_channel_first`; any dtype. With `one_by_one` four maps,
            (B, 4, C, H, W) or (B, H, W, 4, C), of which map k is read along route k only.
        out_channel_first: the result is (B, 4, C, L), else (B, L, 4, C).
        scans: the routes, see above.
        impl: "auto", "cpu", "triton" or "reference"; the last is plain PyTorch without a custom operator.

    Returns:
        Contiguous, dtype of x. The adjoint (and the gradient) is `cross_merge` with the same flags; differentiable any
        number of times, under `torch.func` and in forward mode, too.

    Raises:
        ValueError: a wrong number of dimensions, not four maps, or an unknown `scans`.
        RuntimeError: `impl` cannot run on this device.
    """
    route_dim = 1 if in_channel_first else 3
    _check("cross_scan", "x", x, 5 if one_by_one else 4, route_dim if one_by_one else None)
    flags = (in_channel_first, out_channel_first, one_by_one, _name(scans))
    if impl == "reference":
        return reference.scan(x, *flags)
    return _scan(x, *flags, resolve(CROSS_SCAN, impl, x.device, x.dtype))


def cross_merge(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: str | int = "cross2d",
    *,
    impl: str = "auto",
) -> Tensor:
    """Bring four routes back to row-major order and sum them: the adjoint of `cross_scan` with the same flags.

    Args:
        y: (B, 4, C, H, W), or (B, H, W, 4, C) if not `out_channel_first`: the routes, where H and W only tell the size
            of the map; along L = H*W the numbers stand in the order of their route.
        in_channel_first: the result is (B, C, L), else (B, L, C) (with `one_by_one` (B, 4, C, L) or (B, L, 4, C)).
        one_by_one: only undo the routes, do not sum.

    Returns:
        Contiguous, dtype of y; the sum is formed in at least float32.

    Raises:
        as `cross_scan`.
    """
    _check("cross_merge", "y", y, 5, 1 if out_channel_first else 3)
    flags = (in_channel_first, out_channel_first, one_by_one, _name(scans))
    if impl == "reference":
        return reference.merge(y, *flags)
    return _merge(y, *flags, resolve(CROSS_MERGE, impl, y.device, y.dtype))


def _name(scans: str | int) -> str:
    if isinstance(scans, int) and 0 <= scans < len(SCANS):
        return SCANS[scans]
    if scans not in SCANS:
        legal = ", ".join(f"{i} {name!r}" for i, name in enumerate(SCANS))
        raise ValueError(f"scans={scans!r} is not one of {legal}")
    return scans


def _check(op: str, name: str, x: Tensor, n_dim: int, route_dim: int | None) -> None:
    if x.dim() != n_dim:
        raise ValueError(f"{op}: {name} must have {n_dim} dimensions, got {tuple(x.shape)}")
    if route_dim is not None and x.shape[route_dim] != 4:
        raise ValueError(f"{op}: dimension {route_dim} of {name} holds the 4 routes, got {tuple(x.shape)}")


# ---- registration ---------------------------------------------------------------------------------------------------

CROSS_SCAN = declare("cross_scan", __package__, FLOATING, cpu=("cpu",), triton=("cuda",), reference=None)
CROSS_MERGE = declare("cross_merge", __package__, FLOATING, cpu=("cpu",), triton=("cuda",), reference=None)

_FLAGS = "bool in_channel_first, bool out_channel_first, bool one_by_one, str scans, str impl"


def _fake_scan(x, in_channel_first, out_channel_first, one_by_one, scans, impl):
    if one_by_one:
        batch = x.shape[0]
        channels, height, width = x.shape[2:] if in_channel_first else (x.shape[4], *x.shape[1:3])
    else:
        batch, channels, height, width = x.shape if in_channel_first else (x.shape[0], x.shape[3], *x.shape[1:3])
    length = height * width
    shape = (batch, 4, channels, length) if out_channel_first else (batch, length, 4, channels)
    return x.new_empty(shape, dtype=x.dtype)


def _fake_merge(y, in_channel_first, out_channel_first, one_by_one, scans, impl):
    batch = y.shape[0]
    channels, height, width = y.shape[2:] if out_channel_first else (y.shape[4], *y.shape[1:3])
    length, routes = height * width, (4,) if one_by_one else ()
    shape = (batch, *routes, channels, length) if in_channel_first else (batch, length, *routes, channels)
    return y.new_empty(shape, dtype=y.dtype)


_SCAN = register(CROSS_SCAN, f"cross_scan(Tensor x, {_FLAGS}) -> Tensor", _fake_scan, "scan")
_MERGE = register(CROSS_MERGE, f"cross_merge(Tensor y, {_FLAGS}) -> Tensor", _fake_merge, "merge")


class _CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *flags):
        in_channel_first, ctx.flags = flags[0], flags
        ctx.size = x.shape[-2:] if in_channel_first else x.shape[1:3]
        return below_autograd(_SCAN, x, *flags)

    @staticmethod
    def backward(ctx, grad):
        in_channel_first, out_channel_first, *_ = ctx.flags
        merged = _merge(_as_maps(grad, 3 if out_channel_first else 1, ctx.size), *ctx.flags)
        return _as_maps(merged, merged.dim() - 1 if in_channel_first else 1, ctx.size), *(None for _ in ctx.flags)


class _CrossMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, *flags):
        out_channel_first, ctx.flags = flags[1], flags
        ctx.size = y.shape[-2:] if out_channel_first else y.shape[1:3]
        return below_autograd(_MERGE, y, *flags)

    @staticmethod
    def backward(ctx, grad):
        in_channel_first, out_channel_first, *_ = ctx.flags
        routes = _scan(_as_maps(grad, grad.dim() - 1 if in_channel_first else 1, ctx.size), *ctx.flags)
        return _as_maps(routes, 3 if out_channel_first else 1, ctx.size), *(None for _ in ctx.flags)


def _as_maps(x: Tensor, dim: int, size: tuple[int, int]) -> Tensor:
    """Dimension `dim` of x, L pixels, as H x W; `unflatten` does not work under ``is_grads_batched``."""
    return x.reshape(*x.shape[:dim], *size, *x.shape[dim + 1 :])


_scan = differentiate(_SCAN, _CrossScan.apply, lambda x, *flags: reference.scan(x, *flags[:-1]))
_merge = differentiate(_MERGE, _CrossMerge.apply, lambda y, *flags: reference.merge(y, *flags[:-1]))
