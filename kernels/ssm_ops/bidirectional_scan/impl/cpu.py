"""The bidirectional scan by the compiled CPU library: an image of one row, two routes, each over a map of its own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._image_scan import ImageScan


@functools.lru_cache(maxsize=32)
def _orders(length: int) -> Tensor:
    """(S, L) int32: the token at every place of both directions."""
    there = torch.arange(length, dtype=torch.int32, device="cpu")
    return torch.stack([there, there.flip(0)])


def _scan(x_forward, x_backward, proj, dt_weight, A, D, dt_bias) -> ImageScan:
    length, dim = x_forward.shape[1:]
    parameters = (dt_weight, A.view(2, dim, -1), D.view(2, dim), dt_bias.view(2, dim))
    return ImageScan([x_forward, x_backward], proj, *parameters, _orders(length))


def forward(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, keep_states) -> tuple[Tensor, Tensor]:
    """(out, states); shapes in api.py."""
    y, states = _scan(x_forward, x_backward, proj, dt_weight, A, D, dt_bias).forward(out_dtype, keep_states)
    return y.contiguous(), states


def backward(dout, x_forward, x_backward, proj, dt_weight, A, D, dt_bias, states) -> tuple[Tensor, ...]:
    """Gradients of (x_forward, x_backward, proj, dt_weight, A, D, dt_bias)."""
    call = _scan(x_forward, x_backward, proj, dt_weight, A, D, dt_bias)
    dx, dproj, ddt_weight, dA, dD, dbias = call.backward(dout, states)
    return (
        *(d.to(x_forward.dtype).contiguous() for d in dx),
        dproj.to(proj.dtype),
        ddt_weight,
        dA.view(A.shape),
        dD.view(D.shape),
        dbias.view(dt_bias.shape),
    )
