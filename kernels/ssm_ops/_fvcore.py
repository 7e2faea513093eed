"""What the operators cost, for fvcore, the counter of the papers' tables.

    FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles()).total()

fvcore traces a model and asks a handle, a function of the inputs and outputs of a node of the graph, for its
multiply-accumulates (MACs, which it calls flops). An operator is a node of its own name, or of the autograd function
that calls it, and costs half the FLOPs of `flop_formulas`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ._flops import flop_formulas

Handle = Callable[[Sequence[torch._C.Value], Sequence[torch._C.Value]], "Counter[str]"]

_FUNCTIONS = {
    "selective_scan_fwd": "selective_scan_fwd",
    "ss2d_scan_fwd": "ss2d_scan_fwd",
    "bidirectional_scan_fwd": "bidirectional_scan_fwd",
    "ssd_chunk_scan_fwd": "ssd_chunk_scan_fwd",
    "nc_ssd_fwd": "nc_ssd_fwd",
    "causal_conv1d_fwd": "causal_conv1d_fwd",
    "cross_scan": "_CrossScan",
    "cross_merge": "_CrossMerge",
}
"""The names of the autograd functions, by those of the operators that they call."""


def fvcore_handles(convention: str = "hardware_aware") -> dict[str, Handle]:
    """Handles of all operators, by the kinds of their nodes, to be given to fvcore's ``set_op_handle(**handles)``.

    Raises:
        ValueError: `convention` is neither "hardware_aware" nor "recurrence", see `flop_formulas`.
    """
    formulas = {str(packet).split(".")[1]: formula for packet, formula in flop_formulas(convention).items()}
    handles = {}
    for name in _FUNCTIONS:
        handles |= handles_of(name, formulas[name])
    return handles


def handles_of(name: str, formula: Callable[..., int]) -> dict[str, Handle]:
    """The handles of one operator, with a formula as `flop_formulas` has them."""
    handle = partial(_macs, name.removesuffix("_fwd"), formula)
    return dict.fromkeys((f"ssm_ops::{name}", f"prim::PythonOp.{_FUNCTIONS[name]}"), handle)


def _macs(label: str, formula: Callable[..., int], inputs, outputs) -> Counter[str]:
    return Counter({label: formula(*_arguments(inputs, outputs[0].node()), out_shape=None) // 2})


def _arguments(inputs: Sequence[torch._C.Value], node: torch._C.Node) -> list:
    """The arguments of a call, shapes in place of tensors."""
    if node.kind() != "prim::PythonOp":
        return [_shape_or_value(value) for value in inputs]
    # tensors are inputs of the node, other arguments are kept beside them, "d" and "c" in the string that tells their
    # order; those before the first tensor are the function's own
    tensors, others = iter(inputs), iter(node.scalar_args())
    kinds = node.cconv()
    given = [_shape_or_value(next(tensors)) if kind == "d" else next(others) for kind in kinds]
    return given[kinds.index("d") :]


def _shape_or_value(value: torch._C.Value):
    return value.type().sizes() if value.isCompleteTensor() else value.toIValue()
