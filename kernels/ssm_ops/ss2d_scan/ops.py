"""The registered operators ``ssm_ops::ss2d_scan_fwd`` and ``_bwd``: schemas and fakes. Mathematics: api.py.

`states` is what the backward needs besides the inputs: the float32 state before every chunk of `STATE_CHUNK[impl]`
pixels of a route, (S + 1, B, K, N, D) with S = ceil(H*W / chunk); the last entry is not read.
Out and dx have the strides of x if it is dense. "reference" is a composition of other operators, without these two.
"""

from __future__ import annotations

import torch

from .. import _image_scan
from .._library import SINGLE_AND_HALF, declare, register

SS2D_SCAN = declare("ss2d_scan", __package__, SINGLE_AND_HALF, cpu=("cpu",), triton=("cuda",), reference=None)

STATE_CHUNK = {"cpu": _image_scan.STATE_CHUNK, "triton": 64}
"""Pixels of a route between two saved states, by implementation."""


def _fake_fwd(x, proj, dt_weight, A, D, dt_bias, scans, out_dtype, impl):
    batch, dim, height, width = x.shape
    n_chunks = (height * width + STATE_CHUNK[impl] - 1) // STATE_CHUNK[impl]
    states = x.new_empty((n_chunks + 1, batch, 4, A.shape[1], dim), dtype=torch.float32)
    return torch.empty_like(x, dtype=out_dtype), states


def _fake_bwd(dout, x, proj, dt_weight, A, D, dt_bias, states, scans, impl):
    others = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (proj, dt_weight, A, D, dt_bias))
    return torch.empty_like(x), *others


ss2d_scan_fwd = register(
    SS2D_SCAN,
    "ss2d_scan_fwd(Tensor x, Tensor proj, Tensor dt_weight, Tensor A, Tensor D, Tensor dt_bias, str scans, "
    "ScalarType out_dtype, str impl) -> (Tensor out, Tensor states)",
    _fake_fwd,
    "forward",
)

ss2d_scan_bwd = register(
    SS2D_SCAN,
    "ss2d_scan_bwd(Tensor dout, Tensor x, Tensor proj, Tensor dt_weight, Tensor A, Tensor D, Tensor dt_bias, "
    "Tensor states, str scans, str impl) "
    "-> (Tensor dx, Tensor dproj, Tensor ddt_weight, Tensor dA, Tensor dD, Tensor ddt_bias)",
    _fake_bwd,
    "backward",
)
