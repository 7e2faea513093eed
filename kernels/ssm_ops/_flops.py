"""What the operators cost, for PyTorch's counter ``torch.utils.flop_counter.FlopCounterMode``.

    with FlopCounterMode(custom_mapping=flop_formulas("recurrence")) as counter: ...

or, with "hardware_aware" scans, for every counter from `register_flop_formulas()` on.

A FLOP is one multiplication or one addition, so that a multiply-accumulate (MAC) is two, as in PyTorch's own formulas.
The tables of the papers come from fvcore, which counts MACs and calls them FLOPs: they show half of these numbers.

A scan is counted in one of two conventions:
    "hardware_aware"  what a parallel implementation does: Mamba's prefix scan at 9 MACs per channel, token and state
                      (Gu & Dao 2023, "Mamba", section 3.3; the 9 is that of VMamba's tables);
                      Mamba-2's chunks of tokens as matrix products (Dao & Gu 2024, "Transformers are SSMs", section 6).
    "recurrence"      what the token-by-token loop of the definition does, the "naive" count of VMamba's tables.
Counted are the terms per state, products with matrices and, in `selective_scan`, the skip connection D and the gate z,
as published; exponentials, activations and moves cost nothing. A backward pass includes what an operator computes again
instead of keeping it. The count of an operator is a function of its arguments, whichever implementation it calls; the
API functions with ``impl="reference"`` are plain PyTorch without operators, of which the counter sees the products.

Shapes: B batch, D channels, L length, N state, H heads, P channels of a head, G groups, T tokens of a chunk, R rank of
the step sizes, K taps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch

Shape = Sequence[int]

CONVENTIONS = ("hardware_aware", "recurrence")


class _Cost(NamedTuple):
    """FLOPs per channel, token and state."""

    forward: int
    backward: int


_RECURRENCE = _Cost(
    # dt A: 1; dt u B: 2; h = exp(dt A) h + dt u B: 2; y = sum C h: 2
    forward=7,
    # h again, but for y: 5; its gradient g = dy C + exp(dt A) g: 3; g exp(dt A) h: 2; and five sums of products with
    # them, over states for du and dt, over channels for dB and dC, over tokens for dA: 5 * 2
    backward=20,
)
# A prefix scan makes 11 more of a recurrence; a backward pass has two, of the states and of their gradients.
_PREFIX_SCAN = _Cost(forward=18, backward=_RECURRENCE.backward + 2 * (18 - _RECURRENCE.forward))
_SELECTIVE_SCAN = {"hardware_aware": _PREFIX_SCAN, "recurrence": _RECURRENCE}

# One decay per head leaves no product dt A per state; nor, in the backward, sums with A and of dA.
_SSD_RECURRENCE = _Cost(forward=6, backward=15)


def selective_scan_fwd(convention: str, u: Shape, delta, A: Shape, B, C, D, z, *_, out_shape) -> int:
    """B D L (18 N or 7 N, + 2 with D, + 2 with z): published as 9 B D L N + B D L + B D L MACs."""
    per_token = _SELECTIVE_SCAN[convention].forward * A[1] + 2 * (D is not None) + 2 * (z is not None)
    return prod(u) * per_token


def selective_scan_bwd(convention: str, dout, u: Shape, delta, A: Shape, B, C, D, z, *_, out_shape) -> int:
    """B D L (42 N or 20 N, + 4 with D for du and dD; with z + 4 for dz and dy, and y before the gate again)."""
    per_token = _SELECTIVE_SCAN[convention].backward * A[1] + 4 * (D is not None)
    if z is not None:
        per_token += 4 + 2 * A[1] + 2 * (D is not None)
    return prod(u) * per_token


def ss2d_scan_fwd(convention: str, x: Shape, proj, dt_weight: Shape, A: Shape, *_, out_shape) -> int:
    """Four selective scans with D, and the step sizes from their R numbers: + 4 B D L 2 R."""
    return dt_weight[0] * prod(x) * (_SELECTIVE_SCAN[convention].forward * A[1] + 2 + 2 * dt_weight[2])


def ss2d_scan_bwd(convention: str, dout, x: Shape, proj, dt_weight: Shape, A: Shape, *_, out_shape) -> int:
    """As four selective scans; three products with R: the step sizes again, and the gradients of both their factors."""
    return dt_weight[0] * prod(x) * (_SELECTIVE_SCAN[convention].backward * A[1] + 4 + 6 * dt_weight[2])


def bidirectional_scan_fwd(convention: str, x: Shape, back, proj, dt_weight: Shape, A: Shape, *_, out_shape) -> int:
    """As `ss2d_scan`, of two scans."""
    return ss2d_scan_fwd(convention, x, proj, dt_weight, A, out_shape=out_shape)


def bidirectional_scan_bwd(
    convention: str, dout, x: Shape, back, proj, dt_weight: Shape, A: Shape, *_, out_shape
) -> int:
    """As `ss2d_scan`, of two scans."""
    return ss2d_scan_bwd(convention, dout, x, proj, dt_weight, A, out_shape=out_shape)


def ssd_chunk_scan_fwd(convention: str, x: Shape, dt, A, B: Shape, *rest, out_shape) -> int:
    """Per chunk C B^T of T x T in N, its product with x, the next state, and the last state's part of y."""
    if convention == "recurrence":
        return _SSD_RECURRENCE.forward * prod(x) * B[3]
    _C, _D, _dt_bias, _initial_states, _dt_softplus, chunk_size, *_ = rest
    return _ssd_products(x, B, chunk_size, per_group=1, per_head=1, state=2)


def ssd_chunk_scan_bwd(convention: str, dout, dfinal, x: Shape, dt, A, B: Shape, *rest, out_shape) -> int:
    """C B^T again and its gradients for B and C; both factors of its product with x; five products with states."""
    if convention == "recurrence":
        return _SSD_RECURRENCE.backward * prod(x) * B[3]
    _C, _D, _dt_bias, _initial_states, _states, _dt_softplus, chunk_size, *_ = rest
    return _ssd_products(x, B, chunk_size, per_group=3, per_head=2, state=5)


def _ssd_products(x: Shape, B: Shape, chunk_size: int, per_group: int, per_head: int, state: int) -> int:
    """FLOPs of so many products T x T x N per group, T x T x P per head, and T x N x P per head, over all chunks."""
    (batch, length, heads, head_dim), (groups, n_state) = x, B[2:]
    whole, short = divmod(length, chunk_size)
    squares = whole * chunk_size**2 + short**2  # the sum of T^2
    quadratic = squares * (per_group * groups * n_state + per_head * heads * head_dim)
    return 2 * batch * (quadratic + state * length * heads * head_dim * n_state)


def nc_ssd_fwd(convention: str, x: Shape, dt, A, B: Shape, *_, out_shape) -> int:
    """The state from all tokens, and all tokens from the state: two products of B L H P N MACs; there is no scan."""
    return 2 * 2 * prod(x) * B[3]


def nc_ssd_bwd(convention: str, dout, x: Shape, dt, A, B: Shape, *_, out_shape) -> int:
    """Two products for every one of the forward; the state is kept."""
    return 4 * 2 * prod(x) * B[3]


def causal_conv1d_fwd(convention: str, x: Shape, weight: Shape, *_, out_shape) -> int:
    """B D L K MACs."""
    return 2 * prod(x) * weight[1]


def causal_conv1d_bwd(convention: str, dout, x: Shape, weight: Shape, bias, silu: bool, *_, out_shape) -> int:
    """dx and dweight, and with SiLU its argument again."""
    return (3 if silu else 2) * 2 * prod(x) * weight[1]


def silu_gate_fwd(convention: str, *_, out_shape) -> int:
    """Products by element and an activation, which are not counted, as none of a network's are."""
    return 0


def silu_gate_bwd(convention: str, *_, out_shape) -> int:
    return 0


def cross_scan(convention: str, *_, out_shape) -> int:
    """Nothing but moves."""
    return 0


def cross_merge(convention: str, *_, out_shape) -> int:
    """Three additions per channel and pixel, which are not counted, as no addition of maps is."""
    return 0


_FORMULAS = (
    selective_scan_fwd,
    selective_scan_bwd,
    ss2d_scan_fwd,
    ss2d_scan_bwd,
    bidirectional_scan_fwd,
    bidirectional_scan_bwd,
    ssd_chunk_scan_fwd,
    ssd_chunk_scan_bwd,
    nc_ssd_fwd,
    nc_ssd_bwd,
    causal_conv1d_fwd,
    causal_conv1d_bwd,
    silu_gate_fwd,
    silu_gate_bwd,
    cross_scan,
    cross_merge,
)
"""One per operator, of the same name."""


def flop_formulas(convention: str = "hardware_aware") -> dict[torch._ops.OpOverloadPacket, Callable[..., int]]:
    """FLOPs of every operator as a function of its arguments' shapes, to be a `custom_mapping` of `FlopCounterMode`.

    Raises:
        ValueError: `convention` is neither "hardware_aware" nor "recurrence".
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}")
    return {getattr(torch.ops.ssm_ops, f.__name__): functools.partial(f, convention) for f in _FORMULAS}


def register_flop_formulas() -> None:
    """Let `FlopCounterMode` count the operators by itself, scans as hardware-aware.

    `import ssm_models` does so. `import ssm_ops` does not, because PyTorch's counter imports triton.
    """
    from torch.utils.flop_counter import register_flop_formula

    for packet, formula in flop_formulas().items():
        register_flop_formula(packet)(formula)
