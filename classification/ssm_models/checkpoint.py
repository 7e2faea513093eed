"""Reading weights from files, without ever executing code from them, and loading them strictly."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_ENTRIES = {"auto": ("model", "state_dict", "model_ema"), "model": ("model", "state_dict"), "ema": ("model_ema",)}


class CheckpointError(RuntimeError):
    """A file that cannot be read, or does not fit the model. The message is one line."""


def read_checkpoint(path: str | Path, which: str = "auto") -> dict[str, Tensor]:
    """The weights in a file, on the CPU.

    Args:
        path: a ``.safetensors`` file or one of `torch.save`: a state dict, or a dictionary that holds one under
            "model", "state_dict" or "model_ema". ``module.`` is stripped; of a detector or segmentor the part
            ``backbone.`` is taken, without the prefix.
        which: "model", "ema", or "auto": the first there is of model, state_dict, model_ema.

    Raises:
        CheckpointError: no such file, not a checkpoint, needs pickled code, or has no such weights.
    """
    if which not in _ENTRIES:
        raise ValueError(f"which={which!r} is not one of {', '.join(_ENTRIES)}")
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    content = _read_file(path)
    entry = next((name for name in _ENTRIES[which] if isinstance(content.get(name), Mapping)), None)
    if entry is not None:
        content = content[entry]
    elif which == "ema" or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(f"{path} has no {' or '.join(_ENTRIES[which])} weights; it holds: {found}")
    weights = {name.removeprefix("module."): value for name, value in content.items()}
    backbone = {n.removeprefix("backbone."): v for n, v in weights.items() if n.startswith("backbone.")}
    return backbone or weights


def _read_file(path: Path) -> Mapping:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors; no code is run from files: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError) as error:  # what torch raises for a truncated or foreign file
        raise CheckpointError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_checkpoint(model: nn.Module, path: str | Path, which: str = "auto") -> None:
    """Load the weights of a file into `model`, every one of them or none.

    Args:
        path, which: see `read_checkpoint`. Names of older publications are converted by the model.

    Raises:
        CheckpointError: as `read_checkpoint`, or the first names that are missing, unexpected or of another shape.
    """
    weights = read_checkpoint(path, which)
    convert = getattr(model, "convert_state_dict", dict)
    weights = convert(weights)
    difference = describe_difference(weights, model.state_dict())
    if difference:
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}: {difference}")
    model.load_state_dict(weights, strict=True)


def describe_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], limit: int = 3) -> str:
    """What keeps `found` from loading into `wanted`, the first `limit` names of each kind; "" if nothing does."""

    def some(kind: str, names: list[str]) -> list[str]:
        more = f" and {len(names) - limit} more" if len(names) > limit else ""
        return [f"{kind} {', '.join(names[:limit])}{more}"] if names else []

    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    reshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    return "; ".join(some("missing", missing) + some("unexpected", unexpected) + some("other shapes:", reshaped))
