"""Reading weights from files, without ever executing code from them, and loading them strictly."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .file_kinds import foreign_kind
from .unpickle import CheckpointError, read_pickle
from .weights import is_path, resolve

__all__ = ["CheckpointError", "LoadReport", "Weights", "find_weights", "load_checkpoint", "read_checkpoint"]

_log = logging.getLogger(__name__)

_ENTRIES = {"auto": ("model", "state_dict", "model_ema"), "model": ("model", "state_dict"), "ema": ("model_ema",)}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# of DataParallel, DDP and AveragedModel (which counts in n_averaged), and of torch.compile
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")

_MAX_DIFFERENCE = 1000  # characters: up to nine names

# What a classifier has and a backbone has not, and the other way round.
_OF_CLASSIFIER = re.compile(r"(classifier|norm|head)\.")
_OF_BACKBONE = re.compile(r"(outnorm|fpn)\d+\.")


# ---- reading ----


class Weights(NamedTuple):
    """Weights, and where in a file they were."""

    file: Path
    tensors: dict[str, Tensor]
    entry: str
    """"model", "state_dict" or "model_ema"; "" where the file is a state dict itself."""
    entries: tuple[str, ...]
    """All such entries of the file."""
    beside: tuple[str, ...]
    """Tensors of a detector or segmentor that are not the backbone's: neck, heads."""


def read_checkpoint(path: str | Path, which: str = "auto") -> dict[str, Tensor]:
    """The weights in a file, on the CPU.

    Args:
        path: a name of the table of published weights (`ssm_models.weights`), which names the set to read as well, or
            a ``.safetensors`` file or one of `torch.save`: a state dict, or a dictionary that holds one under
            "model", "state_dict" or "model_ema". What wrappers put before names (``module.``, ``_orig_mod.``) is
            stripped; of a detector or segmentor the part ``backbone.`` is taken, without the prefix.
        which: "model", "ema", or "auto": the first there is of model, state_dict, model_ema.

    Raises:
        CheckpointError: no such file, not a checkpoint, needs pickled code, or has no such weights.
    """
    return find_weights(path, which).tensors


def find_weights(path: str | Path, which: str = "auto") -> Weights:
    """`read_checkpoint`, with an account of what was taken."""
    if which not in _ENTRIES:
        raise ValueError(f"which={which!r} is not one of {', '.join(_ENTRIES)}")
    path, which, _ = resolve(path, which)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    content = _read_file(path)
    entries = tuple(name for name in _ENTRIES["auto"] if isinstance(content.get(name), Mapping))
    entry = next((name for name in _ENTRIES[which] if name in entries), "")
    if entry:
        content = content[entry]
    elif which == "ema" or not any(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(f"{path} has no {' or '.join(_ENTRIES[which])} weights; it holds: {found}")
    odd = next((name for name, value in content.items() if not (isinstance(name, str) and _is_plain(value))), None)
    if odd is not None:
        raise CheckpointError(f"{path} has among its weights {odd!r}, which is no ordinary tensor with a name")
    content = {name: value for name, value in content.items() if name != "n_averaged"}
    weights = {_WRAPPERS.sub("", name): value for name, value in content.items()}
    if len(weights) < len(content):
        raise CheckpointError(f"{path} has weights twice, with and without a wrapper's prefix (module., _orig_mod.)")
    backbone = {n.removeprefix("backbone."): v for n, v in weights.items() if n.startswith("backbone.")}
    beside = tuple(name for name in weights if not name.startswith("backbone.")) if backbone else ()
    return Weights(path, backbone or weights, entry, entries, beside)


def _read_file(path: Path) -> Mapping:
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _read_safetensors(path: Path) -> Mapping:
    with open(path, "rb") as file:
        kind = foreign_kind(file, path.suffix)
    if kind:
        raise CheckpointError(f"{path} is not a valid safetensors file: {kind}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error


def _is_plain(value: object) -> bool:
    """Numbers in memory: not sparse, quantized, or a shape without data, which would fail halfway through a load."""
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


# ---- loading ----


class LoadReport(NamedTuple):
    """What a load did beside filling the model."""

    file: Path
    entry: str
    """Where in the file the weights were, see `Weights`."""
    entries: tuple[str, ...]
    """All such entries of the file."""
    fresh: tuple[str, ...]
    """Names of the model that stayed as they were."""
    left_out: tuple[str, ...]
    """Names of the file that the model has no use for."""
    renamed: tuple[str, ...] = ()
    """Names of the file that the model has under others."""

    def __str__(self) -> str:
        loaded = f"loaded {self.entry or 'the state dict'}"
        names = {"stayed as they were:": self.fresh, "left out:": self.left_out, "have other names here:": self.renamed}
        return "; ".join([loaded, *(part for kind, some in names.items() for part in _some(kind, some))])


def load_checkpoint(
    model: nn.Module, path: str | Path, which: str = "auto", new_head: bool = False, allow_nonfinite: bool = False
) -> LoadReport:
    """Load the weights of a file into `model`, every one of them or none.

    A dense backbone takes a classifier's file, too: without the classifier, and keeping its own norms and pyramid.

    Args:
        path, which: see `read_checkpoint`. Names of older publications are converted by the model.
        new_head: leave the last linear layer as it is, whatever the file has: for another set of classes.
        allow_nonfinite: take weights with nan or infinity, too, for those who want to see what became of a model.

    Raises:
        CheckpointError: as `read_checkpoint`, or the first names that are missing, unexpected or of another shape, or
            have values that the model cannot hold, see `describe_values`.
        ValueError: `new_head` for a model without a classifier.
    """
    weights = find_weights(path, which)
    own, found = model.state_dict(), weights.tensors
    if hasattr(model, "convert_state_dict"):
        try:
            found = model.convert_state_dict(found)
        except (ValueError, RuntimeError, LookupError) as error:  # a position embedding that is none
            raise CheckpointError(f"{path} does not fit this {type(model).__name__}: {error}") from error
    fresh, left_out = _parts_of_one_side(model, found, own)
    computed = [n for n in weights.tensors if hasattr(model, "is_computed") and model.is_computed(n)]
    left_out += computed
    if len(found) < len(weights.tensors) - len(computed):
        if not _is_backbone(model):
            raise CheckpointError(f"{path} has weights twice, under old and present names")
        # Vim's drops class tokens while it converts, and renames nothing
        left_out += [name for name in weights.tensors if name not in found]
    renamed = tuple(name for name in weights.tensors if name not in found and name not in left_out)
    head = _classifier_prefix(model)
    if new_head:
        if head is None:
            raise ValueError(f"new_head=True needs a model with a classifier, not a {type(model).__name__}")
        fresh += [name for name in own if name.startswith(head)]
        left_out += [name for name in found if name.startswith(head)]
    found, wanted = _without(found, left_out), _without(own, fresh)
    difference = describe_difference(found, wanted)
    if difference:
        shared = (_without(names, [n for n in names if head and n.startswith(head)]) for names in (found, wanted))
        hint = "" if describe_difference(*shared) else "; new_head=True keeps the model's own classifier"
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}: {difference}{hint}", _MAX_DIFFERENCE)
    fault = describe_values(found, wanted, allow_nonfinite)
    if fault:
        hint = "; allow_nonfinite=True takes them" if "not finite" in fault else ""
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}: {fault}{hint}")
    model.load_state_dict({**own, **found}, strict=True)
    left_out += weights.beside
    report = LoadReport(weights.file, weights.entry, weights.entries, tuple(fresh), tuple(left_out), renamed)
    _log.info("%s: %s", path, report)
    if which == "auto" and is_path(path) and "model_ema" in report.entries and len(report.entries) > 1:
        # which of them has the accuracy that was published, the file does not say
        sets = " and ".join(report.entries)
        _log.warning("%s holds %s; taken: %s (which: model or ema)", report.file, sets, report.entry)
    return report


def _is_backbone(model: nn.Module) -> bool:
    """Whether it is one of `ssm_models.dense`."""
    return getattr(model, "gives_maps", False)


def _parts_of_one_side(
    model: nn.Module, found: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """(names of a backbone that a classifier has not, names that a backbone has no use for)"""
    if not _is_backbone(model):
        return [], []
    of_backbone = any(_OF_BACKBONE.match(name) for name in found)
    fresh = [] if of_backbone else [name for name in own if _OF_BACKBONE.match(name)]
    unneeded = (name in model.unneeded or _OF_CLASSIFIER.match(name) for name in found)
    return fresh, [name for name, drop in zip(found, unneeded, strict=True) if drop and name not in own]


def _classifier_prefix(model: nn.Module) -> str | None:
    """How the names of the layer that gives the logits begin; None for a model without one."""
    if _is_backbone(model) or not hasattr(model, "get_classifier"):
        return None
    head = model.get_classifier()
    return next((f"{name}." for name, module in model.named_modules() if module is head), None)


def _without(tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    left = set(names)
    return {name: value for name, value in tensors.items() if name not in left}


def describe_values(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], allow_nonfinite: bool = False) -> str:
    """What keeps the values of `found`, of the names of `wanted`, from being weights; "" if nothing does.

    float16, bfloat16, float32 and float64 are converted to each other where all values stay finite; integers to
    integers where none changes. Nothing else is: bool, complex, float8, or one kind in the place of the other.
    """
    for name, value in wanted.items():
        given = found[name]
        if value.dtype in _FLOATS and given.dtype in _FLOATS:
            if value.is_meta or allow_nonfinite:
                continue
            converted = given.to(value.dtype)
            # a sum is finite only if all is, and takes a third of the time; a sum may overflow
            if not converted.sum().isfinite() and not (finite := converted.isfinite()).all():
                return f"{name} has {int((~finite).sum())} values that are not finite in {value.dtype}"
        elif value.dtype in _INTEGERS and given.dtype in _INTEGERS:
            if not value.is_meta and not torch.equal(given.to(value.dtype).to(given.dtype), given):
                return f"{name} has values that {value.dtype} cannot hold"
        elif given.dtype != value.dtype:
            return f"{name} is {given.dtype}, not {value.dtype}"
    return ""


def describe_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What keeps `found` from loading into `wanted`, the first names of each kind; "" if nothing does."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    reshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    return "; ".join([*_some("missing", missing), *_some("unexpected", unexpected), *_some("other shapes:", reshaped)])


def _some(kind: str, names: Sequence[str], limit: int = 3) -> list[str]:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{kind} {', '.join(names[:limit])}{more}"] if names else []
