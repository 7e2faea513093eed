"""Parameters and multiply-accumulates of registered models, whole and by module."""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from analyze.flops import LEGEND
from analyze.inputs import check_writable, progress
from analyze.tables import aligned, write_csv
from ssm_models.fvcore_counter import fvcore_macs_by_module
from ssm_models.model_card import ModelCard, macs_by_module, model_card, registered_models
from ssm_train.common.errors import UserError

Counts = dict[str, tuple[int, ...]]
"""Hardware-aware, recurrence and official MACs, by name of the module; "" is the model."""


def pytorch_counts(name: str, input_size: tuple[int, int, int]) -> Counts:
    """Of the registered model `name`, by PyTorch's counter."""
    with torch.device("meta"):
        model = timm.create_model(name)
    return macs_by_module(model, input_size)


@cache
def fvcore_counts(name: str, input_size: tuple[int, int, int]) -> Counts:
    """The same by fvcore."""
    try:
        return fvcore_macs_by_module(timm.create_model(name), input_size)
    except ImportError as error:
        raise UserError("--counter fvcore needs the package fvcore: pip install fvcore") from error


COUNTERS = {"pytorch": pytorch_counts, "fvcore": fvcore_counts}
_MACS = ("macs", "macs_recurrence", "macs_official")


def count(names: list[str], size: list[int] | None, counter: str = "pytorch") -> list[ModelCard]:
    """The cards, at (H, W) or H = W, or each model's own size. Raises ValueError with the offending name or size."""
    if size is not None and len(size) > 2:
        raise ValueError(f"--size {' '.join(map(str, size))} is not H or H W")
    unknown = [name for name in names if name not in registered_models()]
    if unknown:
        raise ValueError(f"--model {' '.join(unknown)}: not among {', '.join(registered_models())}")
    cards = []
    for name in progress(names, "models"):
        height, width = timm.get_pretrained_cfg(name).input_size[1:] if size is None else (size[0], size[-1])
        try:
            card = model_card(name, (3, height, width))
        except (ValueError, RuntimeError) as error:  # the latter: PyTorch's, of a map smaller than a convolution
            raise ValueError(f"{name} on {height}x{width} pixels: {error}") from error
        if counter != "pytorch":
            card = replace(card, **dict(zip(_MACS, COUNTERS[counter](name, card.input_size)[""], strict=True)))
        cards.append(card)
    return cards


def table(cards: list[ModelCard]) -> str:
    """One line per model, in aligned columns."""
    columns = ("model", "size", "parameters", "GMACs: hardware-aware", "recurrence", "official", "published")
    return _aligned([columns, *(_row(card) for card in cards)], left=1)


def _aligned(rows: list[tuple[str, ...]], left: int) -> str:
    """Columns of text, the first `left` of them flush left, the first row above a rule."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(aligned([rows[0], ["-" * width for width in widths], *rows[1:]], left))


def _row(card: ModelCard) -> tuple[str, ...]:
    macs = (card.macs, card.macs_recurrence, card.macs_official, card.macs_published)
    size = "x".join(map(str, card.input_size[1:]))
    return card.name, size, f"{card.parameters:,}", *("-" if n is None else f"{n / 1e9:.6f}" for n in macs)


def write_cards(cards: list[ModelCard], path: Path) -> None:
    """Exact numbers; an empty cell where nothing is published."""
    macs = (*_MACS, "macs_published")
    rows = ((c.name, *c.input_size[1:], c.parameters, *(getattr(c, column) for column in macs)) for c in cards)
    write_csv(path, ("model", "height", "width", "parameters", *macs), rows)


# ---- per module ------------------------------------------------------------------------------------------------------

_ITSELF = "(itself)"


class Module(NamedTuple):
    """What a module costs for one image; `path` is its name in the model, "" for the model."""

    path: str
    kind: str
    parameters: int
    macs: int
    macs_recurrence: int
    macs_official: int

    @property
    def depth(self) -> int:
        return len(self.path.split(".")) if self.path else 0


def tree(name: str, input_size: tuple[int, int, int], depth: int, counter: str = "pytorch") -> list[Module]:
    """The modules of a registered model down to `depth`, parents first; the numbers of parts add up to their parent's.

    The first is the model, with the numbers of its card. Left out are modules that have and do nothing counted.
    """
    counts = COUNTERS[counter](name, input_size)
    with torch.device("meta"):
        model = timm.create_model(name)
    found: list[Module] = []

    def add(path: str, module: nn.Module, level: int) -> tuple[int, ...]:
        """Enter the module and what is below it; returns its numbers."""
        place = len(found)
        parts = [add(f"{path}.{part}".strip("."), child, level + 1) for part, child in module.named_children()]
        sums = tuple(map(sum, zip(*parts, strict=True))) if parts else (0, 0, 0, 0)
        # a list of modules is never called: it costs what its parts cost
        numbers = (sum(p.numel() for p in module.parameters()), *counts.get(path, sums[1:]))
        own = tuple(whole - part for whole, part in zip(numbers, sums, strict=True))
        if parts and any(own) and level < depth:
            found.append(Module(f"{path}.{_ITSELF}".strip("."), "", *own))
        if level <= depth and any(numbers):
            found.insert(place, Module(path, type(module).__name__, *numbers))
        return numbers

    add("", model, 0)
    return found


def tree_table(modules: Iterable[Module]) -> str:
    """One line per module, indented; MACs in 1e9, and their share of the model."""
    modules = list(modules)
    columns = ("module", "type", "parameters", "GMACs: hardware-aware", "share", "recurrence", "official")
    rows = [columns]
    for module in modules:
        label = "  " * module.depth + (module.path.rpartition(".")[2] or "(model)")
        share = f"{module.macs / modules[0].macs:.1%}"
        giga = [f"{n / 1e9:.6f}" for n in module[3:]]
        rows.append((label, module.kind, f"{module.parameters:,}", giga[0], share, *giga[1:]))
    return _aligned(rows, left=2)


def write_tree_csv(trees: dict[str, list[Module]], path: Path) -> None:
    """Exact numbers of every module of every model."""
    rows = ((name, module.depth, *module) for name, modules in trees.items() for module in modules)
    write_csv(path, ("model", "depth", "module", "type", *Module._fields[2:]), rows)


# ---- command ---------------------------------------------------------------------------------------------------------


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    if args.tree is not None and args.tree < 0:
        raise UserError(f"--tree {args.tree} must be at least 0")
    check_writable(args.out)
    try:
        cards = count(args.model or registered_models(), args.size, args.counter)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(table(cards), LEGEND, sep="\n\n")
    shown = cards if args.tree is not None else []
    trees = {card.name: tree(card.name, card.input_size, args.tree, args.counter) for card in shown}
    for name, modules in trees.items():
        print(f"\n{name}\n{tree_table(modules)}")
    write_tree_csv(trees, args.out) if trees else write_cards(cards, args.out)
    print(f"\n{args.out}")
