"""The bidirectional scan in Triton: two routes, each over a map of its own (_triton_routes.py, where it is told how).

Bytes per token and channel, e those of an element, with F = R + 2 N:

    forward    3 e + 2 F e / D     (+ N / 8 of states, where a backward follows)
    backward   5 e + 4 F e / D + N / 8

are the least. One program that walks both directions writes the sum of the first in float32 and reads it back, 8 bytes
more, and every block of 32 channels reads proj, mostly from the second-level cache, and leaves a partial of its
gradient, F / 4 bytes.

Shapes: B batch, L length, D channels, S = 2 directions, N state, R rank of the step sizes.
"""

from __future__ import annotations

from torch import Tensor

from ..._triton_routes import backward as scan_backward
from ..._triton_routes import forward as scan_forward


def forward(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, keep_states) -> tuple[Tensor, Tensor]:
    """(out, states); shapes in api.py."""
    maps = [x_forward.contiguous(), x_backward.contiguous()]
    return scan_forward(maps, proj, dt_weight, A, D, dt_bias, None, out_dtype, keep_states)


def backward(dout, x_forward, x_backward, proj, dt_weight, A, D, dt_bias, states) -> tuple[Tensor, ...]:
    """Gradients of (x_forward, x_backward, proj, dt_weight, A, D, dt_bias)."""
    inputs = ([x_forward.contiguous(), x_backward.contiguous()], proj, dt_weight, A, D, dt_bias)
    dx, *rest = scan_backward(dout.contiguous(), *inputs, None, states, "bidirectional_scan")
    return *dx, *rest
