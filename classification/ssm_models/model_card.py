"""Parameters and multiply-accumulates (MACs) of a model, in the conventions of the papers' tables.

The "FLOPs" of those tables are MACs as fvcore counts them: a convolution or a product of matrices its MACs, LayerNorm 5
per number, BatchNorm 2, activations and additions nothing, plus a formula for the scans. PyTorch's `FlopCounterMode`
counts 2 FLOPs per MAC; it does the counting here, completed by what it does not know, and its sums are halved.

Scans count either as hardware-aware (a prefix scan, 9 MACs per channel, token and state), as in the tables, or as the
plain recurrence (3.5), see `ssm_ops.flop_formulas`.

fvcore rounds an einsum to four digits, this module rounds nothing. So the published totals of models that were counted
with einsums differ from it a little: `vanilla_vmamba_*` (projections of the scan) by up to 3e-5 of the total, VSSD
(attention) by up to 5e-7. The others agree to the last digit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
from torch._subclasses import FakeTensorMode

from ssm_ops import flop_formulas

__all__ = ["PUBLISHED_MACS", "ModelCard", "macs_by_module", "model_card", "registered_models"]

PUBLISHED_MACS = {
    "vanilla_vmamba_tiny": 5_626_895_040,
    "vanilla_vmamba_small": 11_231_522_784,
    "vanilla_vmamba_base": 18_020_115_136,
    "vmamba_tiny_s2l5": 4_857_742_080,
    "vmamba_small_s2l15": 8_715_774_720,
    "vmamba_base_s2l15": 15_358_944_256,
    "vmamba_tiny_s1l8": 4_905_609_984,
    "vmamba_small_s1l20": 8_612_211_456,
    "vmamba_base_s1l20": 15_220_859_904,
    "vssd_micro": 2_305_701_632,
    "vssd_tiny": 4_475_384_800,
    "vssd_small": 7_365_999_448,
    "vssd_base": 16_066_232_896,
}
"""What the official counters give for one image of 224x224 pixels. There is none for Vim, and
Mamba-2's scans (m2) are not counted upstream."""


# ---- conventions: FLOPs (two per MAC) from the shapes of an operator's arguments -------------------------------------

aten = torch.ops.aten
Formulas = Mapping[torch._ops.OpOverloadPacket, Callable[..., int]]


def _layer_norm(x, normalized_shape, weight, *_, out_shape) -> int:
    return 2 * (4 if weight is None else 5) * prod(x)


def _batch_norm(x, weight, *_, out_shape) -> int:
    return 2 * (1 if weight is None else 2) * prod(x)


def _average_pool(x, *_, out_shape) -> int:
    return 2 * prod(x)


def attention_flops(q, k, v, *_, out_shape) -> int:
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def one_head_flops(x, dt, A, B, C, D, dt_bias, dt_softplus, *_, out_shape) -> int:
    """B and C are shared by all heads of a group, and fvcore counts a broadcast product by its smaller operand.

    The second generation of VSSD, whose weights come ready, without a softplus, has keys of its own for every head.
    """
    return 2 * 2 * prod(B) * x[3] * (1 if dt_softplus else x[2] // B[2])


_COMMON: Formulas = {
    aten.native_layer_norm: _layer_norm,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm,  # what it becomes in eval mode
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
}
"""What `FlopCounterMode` does not know."""


class _Family(NamedTuple):
    convention: str
    also: Formulas = {}
    """What its tables count besides."""
    instead: Formulas = {}
    """What its official counter counts wrongly."""


_FAMILIES = {
    "VSSM": _Family(
        "fvcore with VMamba's formula for the scan; the pooling counts 1 per number it reads",
        also={aten.mean: _average_pool},
    ),
    "VSSD": _Family(
        "fvcore; the official counter takes the two products of NC-SSD for one head per group instead of all; "
        "that of ICCV 2025 does not",
        instead={torch.ops.ssm_ops.nc_ssd_fwd: one_head_flops},
    ),
    "VisionMamba": _Family("that of VMamba, as Vim has no counter of its own; RMSNorm, unknown to fvcore, is free"),
}
"""By the name of the model's class."""


# ---- the card --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCard:
    """What a model costs for one image."""

    name: str
    input_size: tuple[int, int, int]
    """(channels, height, width)"""
    parameters: int
    macs: int
    """Everything, with hardware-aware scans."""
    macs_recurrence: int
    """The same without the hardware-aware algorithm: scans as plain recurrences."""
    macs_official: int
    """As the family's official counter has it, its rounding apart; it differs from `macs` where that counter errs."""
    macs_published: int | None
    """The official number, for models given by name at 224x224."""
    macs_by_operator: dict[str, int]
    """`macs` by PyTorch operator. These may depend on what is built (a fused scan or its parts), their sum does not."""
    convention: str
    """How the family's tables are counted."""

    def __str__(self) -> str:
        rows = {
            "parameters": self.parameters,
            "MACs, hardware-aware scans": self.macs,
            "MACs, scans as recurrences": self.macs_recurrence,
            "MACs, official counter": self.macs_official,
            "MACs, published": self.macs_published,
            **{f"  {name}": number for name, number in self.macs_by_operator.items()},
        }
        width = max(map(len, rows))
        numbers = [f"  {key:<{width}} {'-' if n is None else format(n, ','):>16}" for key, n in rows.items()]
        title = f"{self.name}, one image of {'x'.join(map(str, self.input_size))}"
        return "\n".join([title, *numbers, f"  convention: {self.convention}"])


def registered_models() -> list[str]:
    """Names of all models of this package."""
    return [name for family in ("vssm", "vim", "vssd") for name in timm.list_models(module=family)]


def model_card(model: str | nn.Module, input_size: int | tuple[int, int, int] = (3, 224, 224)) -> ModelCard:
    """Count a model on tensors without memory; a given one stays as it is.

    Args:
        model: a registered name, or a `VSSM`, `VSSD` or `VisionMamba` on any device, dense backbones included.
        input_size: (channels, height, width) of the image, or the side of a square one with the model's channels.

    Raises:
        ValueError: an unknown name, another kind of model, or an impossible size.
        RuntimeError: PyTorch's, of a map smaller than a convolution.
    """
    if isinstance(input_size, int):
        input_size = (getattr(model, "in_chans", 3), input_size, input_size)
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size={input_size} is not (channels, height, width), each at least 1")
    name, published = type(model).__name__, None
    if isinstance(model, str):
        if model not in registered_models():
            raise ValueError(f"model {model!r} is not one of {', '.join(registered_models())}")
        name, published = model, PUBLISHED_MACS.get(model) if tuple(input_size) == (3, 224, 224) else None
        with torch.device("meta"):
            model = timm.create_model(model)
    family = next((_FAMILIES[c.__name__] for c in type(model).__mro__ if c.__name__ in _FAMILIES), None)
    if family is None:
        raise ValueError(f"model is a {name}, which is not one of {', '.join(_FAMILIES)}")

    ours = {**_COMMON, **family.also}
    conventions = (ours, {**ours, **flop_formulas("recurrence")}, {**ours, **family.instead})
    with FakeTensorMode():
        shell = _without_memory(model)
        image = torch.empty(1, *input_size, dtype=next(shell.parameters()).dtype)
        macs, recurrence, official = _count_macs(shell, image, conventions)
    return ModelCard(
        name=name,
        input_size=tuple(input_size),
        parameters=sum(parameter.numel() for parameter in shell.parameters()),
        macs=sum(macs.values()),
        macs_recurrence=sum(recurrence.values()),
        macs_official=sum(official.values()),
        macs_published=published,
        macs_by_operator={operator: number for operator, number in macs.items() if number},
        convention=family.convention,
    )


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy of fake tensors, in eval mode, whose scans are registered operators, for only those can be counted."""
    replaced = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        replaced[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    shell = copy.deepcopy(model, replaced).eval()
    for module in shell.modules():
        if hasattr(module, "impl"):
            module.impl = "auto"
    return shell


def _count_macs(model: nn.Module, image: torch.Tensor, conventions: tuple[Formulas, ...]) -> list[dict[str, int]]:
    """MACs of one forward pass by operator, once for each set of formulas beside the registered ones."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: only when needed

    with torch.no_grad(), ExitStack() as stack:
        counters = [stack.enter_context(FlopCounterMode(display=False, custom_mapping=dict(c))) for c in conventions]
        model(image)
    counts = [counter.get_flop_counts()["Global"] for counter in counters]
    return [{str(operator): flops // 2 for operator, flops in count.items()} for count in counts]


def macs_by_module(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """MACs of every module that computes, by its name in the model: hardware-aware, recurrence, official."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: only when needed

    family = _FAMILIES[type(model).__name__]
    ours = {**_COMMON, **family.also}
    conventions = (ours, {**ours, **flop_formulas("recurrence")}, {**ours, **family.instead})
    with FakeTensorMode(), torch.no_grad(), ExitStack() as stack:
        shell = _without_memory(model)
        counters = [stack.enter_context(FlopCounterMode(display=False, custom_mapping=dict(c))) for c in conventions]
        shell(torch.empty(1, *input_size, dtype=next(shell.parameters()).dtype))
    counts = [counter.get_flop_counts() for counter in counters]
    root = type(model).__name__
    return {
        path.removeprefix(root).removeprefix("."): tuple(
            sum(flops // 2 for flops in count.get(path, {}).values()) for count in counts
        )
        for path in set().union(*counts) - {"Global"}
    }
