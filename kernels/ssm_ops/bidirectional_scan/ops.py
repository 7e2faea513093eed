"""The registered operators ``ssm_ops::bidirectional_scan_fwd`` and ``_bwd``: schemas and fakes. Mathematics: api.py.

`states` is what the backward needs besides the inputs: the float32 state before every chunk of `STATE_CHUNK` tokens of
a direction, (C + 1, B, S, N, D) with C = ceil(L / chunk); the last entry is not read. "reference" is a composition of
other operators, without these two.
"""

from __future__ import annotations

import torch

from .._image_scan import STATE_CHUNK
from .._library import SINGLE_AND_HALF, declare, register

BIDIRECTIONAL_SCAN = declare("bidirectional_scan", __package__, SINGLE_AND_HALF, cpu=("cpu",), reference=None)


def _fake_fwd(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, out_dtype, impl):
    batch, length, dim = x_forward.shape
    n_chunks = (length + STATE_CHUNK - 1) // STATE_CHUNK
    states = x_forward.new_empty((n_chunks + 1, batch, 2, A.shape[1], dim), dtype=torch.float32)
    return torch.empty_like(x_forward, dtype=out_dtype, memory_format=torch.contiguous_format), states


def _fake_bwd(dout, x_forward, x_backward, proj, dt_weight, A, D, dt_bias, states, impl):
    inputs = (x_forward, x_backward, proj, dt_weight, A, D, dt_bias)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)


bidirectional_scan_fwd = register(
    BIDIRECTIONAL_SCAN,
    "bidirectional_scan_fwd(Tensor x_forward, Tensor x_backward, Tensor proj, Tensor dt_weight, Tensor A, Tensor D, "
    "Tensor dt_bias, ScalarType out_dtype, str impl) -> (Tensor out, Tensor states)",
    _fake_fwd,
    "forward",
)

bidirectional_scan_bwd = register(
    BIDIRECTIONAL_SCAN,
    "bidirectional_scan_bwd(Tensor dout, Tensor x_forward, Tensor x_backward, Tensor proj, Tensor dt_weight, Tensor A, "
    "Tensor D, Tensor dt_bias, Tensor states, str impl) -> (Tensor dx_forward, Tensor dx_backward, Tensor dproj, "
    "Tensor ddt_weight, Tensor dA, Tensor dD, Tensor ddt_bias)",
    _fake_bwd,
    "backward",
)
