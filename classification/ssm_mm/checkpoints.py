"""Checkpoints of mmengine, read without executing code from them and loaded strictly."""

import inspect
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from ssm_models.checkpoint import describe_difference
from ssm_train.common.errors import UserError

_STATISTICS = ("min", "max", "current", "mean")
_NAME = re.compile(r"(?:epoch|iter)_(\d+)\.pth")


def allow_mmengine_checkpoints() -> None:
    """Let `torch.load(weights_only=True)`, PyTorch's default, read what mmengine 0.10 saves.

    Beside tensors these are the curves of the log: `HistoryBuffer` objects, which hold numpy arrays of numbers and
    refer to their own statistics as `getattr(HistoryBuffer, name)`. In place of `getattr`, which would reach
    everything, such a reference alone is allowed.
    """
    reconstruct = np.array(0.0).__reduce__()[0]
    scalar = np.float64(0.0).__reduce__()[0]
    kinds = (np.float64, np.float32, np.int64, np.int32, np.bool_)
    # numpy 1 and 2 call the module of these functions by different names
    functions = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in (reconstruct, scalar)
        for core in ("core", "_core")
    ]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_statistic, "builtins.getattr"),
            *functions,
            np.ndarray,
            np.dtype,
            *{type(np.dtype(kind)): None for kind in kinds},
        ]
    )


def _statistic(owner: object, name: str) -> Any:
    """`getattr` for the statistics of HistoryBuffer."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise UserError(f"the checkpoint refers to {name!r} of {owner!r}, which is none of a log: it is not trusted")
    return inspect.getattr_static(HistoryBuffer, name)


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. UserError for a missing, damaged or distrusted file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # what torch raises for files that end early, are no zip archives, or hold other objects
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        # among PyTorch's advice, which includes switching safety off, the line that names what was refused
        marks = ("WeightsUnpickler error", "unsupported GLOBAL")
        reason = next((line for line in lines if any(mark in line for mark in marks)), lines[0]).strip()
        raise UserError(f"checkpoint {path} is damaged or holds code: {reason}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a dictionary")
    return dict(content)


def newest_readable(folder: Path) -> Path | None:
    """The last checkpoint in a work folder that can be read; damaged ones are named and left out."""
    found = {int(match[1]): path for path in folder.glob("*.pth") if (match := _NAME.fullmatch(path.name))}
    for number in sorted(found, reverse=True):
        try:
            read(found[number])
        except UserError as error:
            print(f"left out: {error}")
        else:
            return found[number]
    return None


def load_strictly(model: nn.Module, path: str | Path) -> None:
    """Load a detector or segmentor. UserError names the first differing keys."""
    model.load_state_dict(fitting_weights(model, path))


def fitting_weights(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The weights in a file if they are exactly those of `model`, by its names. Else a UserError."""
    content = read(path)
    weights = content.get("state_dict", content)
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"checkpoint {path} holds no state_dict, but: {', '.join(map(str, list(content)[:8]))}")
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    own = {n.removeprefix("backbone."): v for n, v in weights.items() if n.startswith("backbone.")}
    rest = {n: v for n, v in weights.items() if not n.startswith("backbone.")}
    if hasattr(model.backbone, "convert_state_dict"):  # names of older publications
        own = model.backbone.convert_state_dict(own)
    unneeded = getattr(model.backbone, "unneeded", ())
    weights = {**{f"backbone.{name}": value for name, value in own.items() if name not in unneeded}, **rest}
    difference = describe_difference(weights, model.state_dict())
    if difference:
        raise UserError(f"checkpoint {path} does not fit this {type(model).__name__}: {difference}")
    return weights
