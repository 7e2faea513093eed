"""Non-causal SSD by the compiled CPU library (csrc/cpu/nc_ssd.cpp), all dtypes as they are; products are float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._interface import BLOCK, TILE_TOKENS, Buffer, Map, NcSsdArguments, Rows
from ..._native import call

# parts of tokens that may sum the state side by side; fixed, so that results do not depend on the threads
_MIN_TASKS = 16
_NATIVE = (torch.float32, torch.float16, torch.bfloat16)


def _padded(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def _tiles(length: int) -> int:
    return max(-(-length // TILE_TOKENS), 1)


def _rows(x: Tensor) -> Tensor:
    """(B, L, H, P) whose numbers of a head lie side by side."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, **buffers: Tensor) -> tuple[NcSsdArguments, Tensor]:
    """What both directions are called with, and `sums`, the first of which becomes the state or its gradient."""
    (batch, length, heads, channels), (groups, n_state) = x.shape, B.shape[2:]
    x, B, C, dt = _rows(x), _rows(B), _rows(C), dt.float().transpose(1, 2)
    A, dt_bias = (None if t is None else t.float().contiguous() for t in (A, dt_bias))
    if D is not None:
        D = D.float().reshape(heads, -1).expand(heads, channels).contiguous()
    tiles = _tiles(length)
    parts = min(tiles, max(-(-_MIN_TASKS // max(batch * heads, 1)), 1))
    sums = x.new_empty((parts, batch, heads, n_state, _padded(channels)), dtype=torch.float32)
    a = NcSsdArguments(x=Rows.of(x), B=Rows.of(B), C=Rows.of(C), dt=Map.of(dt, heads))
    for name, t in {"A": A, "D": D, "bias": dt_bias, "sums": sums, **buffers}.items():
        setattr(a, name, Buffer.of(t))
    a.batch, a.length, a.heads, a.channels = x.shape
    a.groups, a.state_size, a.parts, a.tiles = groups, n_state, parts, tiles
    a.softplus, a.positive, a.threads = dt_softplus, positive, torch.get_num_threads()
    a.kept = x, dt, A, B, C, D, dt_bias  # copies live as long as what points to them
    return a, sums


def forward(
    x, dt, A, B, C, D, dt_bias, dt_softplus: bool, positive: bool, bfloat16_products: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    out = x.new_empty(x.shape, dtype=out_dtype if out_dtype in _NATIVE else torch.float32)
    a, sums = _arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, out=out)
    call("cpu", "nc_ssd_forward", a)
    return out.to(out_dtype), sums[0, ..., : x.shape[3]].contiguous()


def backward(
    dout, x, dt, A, B, C, D, dt_bias, state, dt_softplus: bool, positive: bool, bfloat16_products: bool
) -> tuple[Tensor, ...]:
    """As `reference.backward`."""
    dout = _rows(dout if dout.dtype in _NATIVE else dout.float())
    dx, dB, dC = (t.new_empty(t.shape, dtype=t.dtype) for t in (x, B, C))
    ddt = x.new_empty(dt.shape, dtype=torch.float32)
    dA = x.new_empty((x.shape[0], _tiles(x.shape[1]), x.shape[2]), dtype=torch.float32)
    dD = x.new_empty(0) if D is None else x.new_empty((*dA.shape, x.shape[3]), dtype=torch.float32)
    wide, n_state = _padded(x.shape[3]), B.shape[3]
    state = F.pad(state, (0, wide - x.shape[3])).contiguous()
    turned = x.new_empty((2, *state.shape[:2], wide, _padded(n_state)), dtype=torch.float32)
    results = {"state": state, "turned": turned, "dx": dx, "dB": dB, "dC": dC, "ddt": ddt, "dA": dA, "dD": dD}
    a, _ = _arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, **results)
    a.dy = Rows.of(dout)
    call("cpu", "nc_ssd_backward", a)
    return (
        dx,
        ddt.to(dt.dtype),
        dA.sum((0, 1)),
        dB,
        dC,
        dD if D is None else dD.sum((0, 1) if D.dim() == 2 else (0, 1, 3)),
        x.new_empty(0) if dt_bias is None else ddt.sum((0, 1)),
    )
