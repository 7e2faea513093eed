"""The registered operators ``ssm_ops::cross_scan`` and ``ssm_ops::cross_merge``: schemas and fakes. Meaning: api.py.

Shapes: B batch, C channels, H W map, L = H*W, K = 4 routes.
"""

from __future__ import annotations

import torch

from .._library import SINGLE_AND_HALF, declare, register

FLOATING = (*SINGLE_AND_HALF, torch.float64)

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
    return x.new_empty((batch, 4, channels, length) if out_channel_first else (batch, length, 4, channels))


def _fake_merge(y, in_channel_first, out_channel_first, one_by_one, scans, impl):
    batch = y.shape[0]
    channels, height, width = y.shape[2:] if out_channel_first else (y.shape[4], *y.shape[1:3])
    length, routes = height * width, (4,) if one_by_one else ()
    return y.new_empty((batch, *routes, channels, length) if in_channel_first else (batch, length, *routes, channels))


cross_scan = register(CROSS_SCAN, f"cross_scan(Tensor x, {_FLAGS}) -> Tensor", _fake_scan, "scan")
cross_merge = register(CROSS_MERGE, f"cross_merge(Tensor y, {_FLAGS}) -> Tensor", _fake_merge, "merge")
