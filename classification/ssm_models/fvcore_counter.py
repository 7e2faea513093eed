"""Multiply-accumulates (MACs) of the models by fvcore itself, which the papers' tables come from.

    FlopCountAnalysis(model, image).set_op_handle(**fvcore_handles()).total()

fvcore traces the model on real tensors. The handles tell it what it does not know: the operators of `ssm_ops`, fused
attention, and VMamba's pooling where it is a mean.
"""

from __future__ import annotations

from collections import Counter
from math import prod

import torch
from torch import nn

import ssm_ops
from ssm_ops._fvcore import Handle, handles_of

from .model_card import attention_flops, one_head_flops

CONVENTIONS = ("hardware_aware", "recurrence", "official")


def fvcore_handles(convention: str = "hardware_aware") -> dict[str, Handle]:
    """What fvcore's `FlopCountAnalysis.set_op_handle` needs to count the models of this package, by kinds of nodes.

    Args:
        convention: "hardware_aware" or "recurrence" for the scans, see `ssm_ops.flop_formulas`; "official" is
            "hardware_aware" with the error of VSSD's own counter, the numbers of its tables.

    Raises:
        ValueError: an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}")
    official = convention == "official"
    handles = ssm_ops.fvcore_handles("hardware_aware" if official else convention)
    if official:
        handles |= handles_of("nc_ssd_fwd", one_head_flops)
    return handles | {"aten::mean": _mean, "aten::scaled_dot_product_attention": _attention}


def _shape(value: torch._C.Value) -> list[int]:
    return value.type().sizes()


def _mean(inputs, outputs) -> Counter[str]:
    """The mean over a map in VMamba's head: an `AdaptiveAvgPool2d` in its authors' code, which fvcore counts.

    VSSD's authors have an `AdaptiveAvgPool1d` there, which fvcore does not count, and other means are none of pooling.
    """
    in_vmamba = "classifier.pool" in outputs[0].node().scopeName()
    return Counter({"mean": prod(_shape(inputs[0])) if in_vmamba else 0})


def _attention(inputs, outputs) -> Counter[str]:
    return Counter({"attention": attention_flops(*map(_shape, inputs[:3]), out_shape=None) // 2})


def fvcore_macs_by_module(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """As `model_card.macs_by_module`, counted by fvcore: hardware-aware, recurrence, official, by name of the module.

    Args:
        model: on any device; it runs once for each of the three.
        input_size: (channels, height, width) of the image.

    Raises:
        ImportError: fvcore is not installed.
    """
    from fvcore.nn import FlopCountAnalysis  # not of every installation

    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device)
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            counts = [_count(FlopCountAnalysis(model, image), convention) for convention in CONVENTIONS]
    finally:
        model.train(training)
    return {path: tuple(int(count[path]) for count in counts) for path in counts[0]}


def _count(analysis, convention: str) -> Counter[str]:
    analysis.set_op_handle(**fvcore_handles(convention))
    # of activations and moves, and of layers that a fused operator replaces
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
