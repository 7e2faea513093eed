"""What the operators cost, for fvcore, the counter of the papers' tables.

    FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles()).total()

fvcore traces a model and asks a handle, a function of the inputs and outputs of a node of the graph, for its
multiply-accumulates (MACs, which it calls flops). An operator is a node of its own name, and costs half the FLOPs of
`flop_formulas`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ._flops import flop_formulas

Handle = Callable[[Sequence[torch._C.Value], Sequence[torch._C.Value]], "Counter[str]"]

_OPERATORS = ("selective_scan_fwd", "ss2d_scan_fwd", "bidirectional_scan_fwd", "ssd_chunk_scan_fwd", "nc_ssd_fwd")
_OPERATORS += ("causal_conv1d_fwd", "cross_scan", "cross_merge")


def fvcore_handles(convention: str = "hardware_aware") -> dict[str, Handle]:
    """Handles of all operators, by the kinds of their nodes, to be given to fvcore's ``set_op_handle(**handles)``.

    Raises:
        ValueError: `convention` is neither "hardware_aware" nor "recurrence", see `flop_formulas`.
    """
    formulas = {str(packet).split(".")[1]: formula for packet, formula in flop_formulas(convention).items()}
    handles = {}
    for name in _OPERATORS:
        handles |= handles_of(name, formulas[name])
    return handles


def handles_of(name: str, formula: Callable[..., int]) -> dict[str, Handle]:
    """The handle of one operator, with a formula as `flop_formulas` has them."""
    return {f"ssm_ops::{name}": partial(_macs, name.removesuffix("_fwd"), formula)}


def _macs(label: str, formula: Callable[..., int], inputs, outputs) -> Counter[str]:
    return Counter({label: formula(*map(_shape_or_value, inputs), out_shape=None) // 2})


def _shape_or_value(value: torch._C.Value):
    """A shape in place of a tensor."""
    return value.type().sizes() if value.isCompleteTensor() else value.toIValue()
