"""SS2D's scan by the compiled CPU library (csrc/cpu/ss2d_scan.cpp)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._common import ROUTES, walk
from ..._image_scan import ImageScan


@functools.lru_cache(maxsize=32)
def _orders(height: int, width: int, scans: str) -> Tensor:
    """(K, L) int32: the pixel at every place of every route."""
    image = torch.arange(height * width, dtype=torch.int32, device="cpu").view(1, 1, height, width)
    return torch.cat([walk(image, *route)[0] for route in ROUTES[scans]])


def _tokens(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, L, D), a view where x is channels-last"""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _like(x: Tensor, given: Tensor) -> Tensor:
    """(B, L, D) -> (B, D, H, W) with the strides of `given`, if that is dense, as the fake says."""
    x = x.unflatten(1, given.shape[2:]).permute(0, 3, 1, 2)
    wanted = torch.empty_like(given, dtype=x.dtype)
    return x if x.stride() == wanted.stride() else wanted.copy_(x)


def _scan(x, proj, dt_weight, A, D, dt_bias, scans) -> ImageScan:
    dim = x.shape[1]
    parameters = (dt_weight, A.view(4, dim, -1), D.view(4, dim), dt_bias.view(4, dim))
    return ImageScan([_tokens(x)], proj.flatten(1, 2), *parameters, _orders(*x.shape[2:], scans))


def forward(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, keep_states) -> tuple[Tensor, Tensor]:
    """(out, states); shapes in api.py."""
    y, states = _scan(x, proj, dt_weight, A, D, dt_bias, scans).forward(out_dtype, keep_states)
    return _like(y, x), states


def backward(dout, x, proj, dt_weight, A, D, dt_bias, states, scans) -> tuple[Tensor, ...]:
    """Gradients of (x, proj, dt_weight, A, D, dt_bias)."""
    call = _scan(x, proj, dt_weight, A, D, dt_bias, scans)
    (dx,), dproj, ddt_weight, dA, dD, dbias = call.backward(_tokens(dout), states)
    return (
        _like(dx.to(x.dtype), x),
        dproj.view(proj.shape).to(proj.dtype),
        ddt_weight,
        dA.view(A.shape),
        dD.view(D.shape),
        dbias.view(dt_bias.shape),
    )
