"""What is in a checkpoint, and its conversion to a plain .safetensors file."""

import argparse
import hashlib
import math
import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from analyze.inputs import weights_file
from analyze.quick import quick_run, say
from ssm_models import CheckpointError
from ssm_models.checkpoint import Weights, describe_difference, find_weights
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import sync_folder, write_synced

# family: module of the zoo, and a name that only its models have
_FAMILIES = {
    "vmamba": ("vssm", re.compile(r"layers\.\d+\.blocks\.\d+\.(op|self_attention)\.")),
    "vim": ("vim", re.compile(r"layers\.\d+\.mixer\.")),
    "vssd": ("vssd", re.compile(r"layers\.\d+\.blocks\.\d+\.cpe1\.")),
}
_BODY = re.compile(r"patch_embed|pos_embed|cls_token|rope|layers")  # what classifiers and backbones share
_BUFFER = re.compile(r".*\.(running_mean|running_var|num_batches_tracked)|rope\.")


class Recognised(NamedTuple):
    tensors: dict[str, Tensor]
    """With today's names and shapes, if there is such a model."""
    family: str | None
    model: str | None
    """A registered model with these weights, the classifier's number of classes apart."""


def recognise(tensors: dict[str, Tensor]) -> Recognised:
    """Whose weights are these? Known by their names and shapes; no value is changed."""
    for family, (module, pattern) in _FAMILIES.items():
        if not any(pattern.match(name) for name in tensors):
            continue
        for name in timm.list_models(module=module):
            model = _shell(name)
            try:
                converted = model.convert_state_dict(tensors) if hasattr(model, "convert_state_dict") else tensors
            except ValueError:  # a position embedding that no grid of this model can come from
                continue
            kept = list(map(Tensor.numel, converted.values())) == list(map(Tensor.numel, tensors.values()))
            if kept and not describe_difference(_body(converted), _body(model.state_dict())):
                return Recognised(converted, family, name)
        return Recognised(tensors, family, None)
    return Recognised(tensors, None, None)


@cache
def _shell(name: str) -> nn.Module:
    """A registered model without memory."""
    with torch.device("meta"):
        return timm.create_model(name)


def _body(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if _BODY.match(name)}


def inspect(source: Path, which: str = "auto") -> str:
    """An account of the weights in `source`. UserError for an unreadable or refused file, or no such weights."""
    return _account(_read(source, which))


def convert(source: Path, target: Path, which: str = "auto", overwrite: bool = False) -> str:
    """Write the weights of `source` to `target`, completely or not at all; returns an account of it.

    Raises:
        UserError: an unreadable or refused file, no such weights, or a `target` that exists or has another suffix.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors, which is what readers go by")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; --overwrite replaces it")
    found = _read(source, which)
    # a copy each, because the format has no tensors that share memory
    plain = found.recognised.tensors.items()
    tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in plain}
    data = save(tensors, metadata={"format": "pt"})
    _write(target, data)
    return "\n".join([_account(found), _line("wrote", target), _line("sha256", hashlib.sha256(data).hexdigest())])


class _Found(NamedTuple):
    source: Path
    weights: Weights
    recognised: Recognised


def _read(source: Path, which: str) -> _Found:
    source = weights_file(source, "IN") if source.is_dir() else source
    try:
        weights = find_weights(source, which)
        source = weights.file
    except CheckpointError as error:
        raise UserError(str(error)) from error
    return _Found(source, weights, recognise(weights.tensors))


def _account(found: _Found) -> str:
    weights, (tensors, family, model) = found.weights, found.recognised
    parameters = sum(math.prod(value.shape) for name, value in tensors.items() if not _BUFFER.match(name))
    held = f"the file holds {', '.join(weights.entries)}" if weights.entries else "the file is a state dict"
    left_out = f"; left out: {len(weights.beside)} tensors beside the backbone" if weights.beside else ""
    lines = [
        ("read", found.source),
        ("sha256", _sha256(found.source)),
        ("weights", f"{weights.entry or 'all'} ({held}){left_out}"),
        ("family", family or "unknown"),
        ("model", model or "none of the registered ones; names are those of the file"),
        ("numbers", f"{len(tensors)} tensors, {parameters:,} parameters"),
    ]
    return "\n".join(_line(*line) for line in lines)


def _line(key: str, value: object) -> str:
    return f"{key:<8} {value}"


def _write(target: Path, data: bytes) -> None:
    aside = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(aside, data)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    if args.source is None:
        args.source = quick_run()
        say(f"taking IN {args.source}")
    if args.target is None:
        print(inspect(args.source, args.which))
    else:
        print(convert(args.source, args.target, args.which, args.overwrite))
