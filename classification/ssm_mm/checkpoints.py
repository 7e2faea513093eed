"""Checkpoints of mmengine, read without executing code from them and loaded strictly."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssm_mm.log_values import plain
from ssm_models.checkpoint import describe_difference, describe_values
from ssm_models.unpickle import CheckpointError, read_pickle
from ssm_models.weights import resolve
from ssm_train.common.errors import UserError

_NAME = re.compile(r"(?:epoch|iter)_(\d+)\.pth")


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint (a file, or a name of published weights), on the CPU: tensors, plain values, arrays
    of numbers and the curves of the log.

    Without the text of the config, which mmengine executes when it resumes. UserError for a missing, damaged or
    distrusted file.
    """
    try:
        path = resolve(path).path
        if not path.is_file():
            raise UserError(f"checkpoint {path} does not exist")
        content = read_pickle(path)
    except (CheckpointError, OSError) as error:
        raise UserError(f"checkpoint {error}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a dictionary")
    try:
        content = plain(content)
    except ValueError as error:
        raise UserError(f"checkpoint {path} holds {error}: it is not trusted") from error
    for place in (content.get("meta"), _entry(content, "message_hub", "runtime_info")):
        if isinstance(place, dict):
            place.pop("cfg", None)
            place.pop("config", None)
    return content


def _entry(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def read_to_resume(path: str | Path) -> dict[str, Any]:
    """`read`; UserError where it has not what a training goes on from."""
    content = read(path)
    counts = [_entry(content, "meta", name) for name in ("epoch", "iter")]
    hub = [_entry(content, "message_hub", name) for name in ("log_scalars", "runtime_info", "resumed_keys")]
    if not all(type(count) is int and count >= 0 for count in counts) or not all(isinstance(it, dict) for it in hub):
        raise UserError(
            f"checkpoint {path} holds no state of a training: to start from its weights, use --cfg-options "
            f"load_from={path}"
        )
    return content


def newest_readable(folder: Path) -> Path | None:
    """The last checkpoint in a work folder that can be read; damaged ones are named and left out."""
    found = {int(match[1]): path for path in folder.glob("*.pth") if (match := _NAME.fullmatch(path.name))}
    for number in sorted(found, reverse=True):
        try:
            read_to_resume(found[number])
        except UserError as error:
            print(f"left out: {error}")
        else:
            return found[number]
    return None


def dataset_meta(path: str | Path) -> dict[str, Any]:
    """Names and colours of the classes that the model in a checkpoint knows; without what is none."""
    found, kept = _entry(read(path), "meta", "dataset_meta"), {}
    names, colours = _entry(found, "classes"), _entry(found, "palette")
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        kept["classes"] = tuple(names)
    if isinstance(colours, (list, tuple)) and all(_is_colour(colour) for colour in colours):
        kept["palette"] = [tuple(colour) for colour in colours]
    return kept


def _is_colour(value: Any) -> bool:
    three = isinstance(value, (list, tuple)) and len(value) == 3
    return three and all(type(part) is int and 0 <= part < 256 for part in value)


class Options(NamedTuple):
    """How weights are taken from a checkpoint."""

    which: str = "auto"
    """"model" or "ema" where a training kept averaged weights, too; "auto" takes those, as mmengine does."""
    allow_nonfinite: bool = False
    """Take weights with nan or infinity, too."""


_DEFAULT = Options()


def load_strictly(model: nn.Module, path: str | Path, options: Options) -> None:
    """Load a detector or segmentor. UserError names the first differing keys."""
    content = read(path)
    model.load_state_dict(fit(model, content, path, options))
    if "ema_state_dict" in content:
        taken = "plain" if options.which == "model" else "averaged"
        print(f"checkpoint {path} holds plain and averaged weights, taken: {taken}")


def fitting_weights(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The weights in a file if they are exactly those of `model`, by its names. Else a UserError."""
    return fit(model, read(path), path)


def _set(content: dict[str, Any], path: str | Path, which: str) -> Any:
    """The weights that `which` means."""
    averaged, plain_ones = content.get("state_dict", content), content.get("ema_state_dict")
    if plain_ones is None:
        if which == "ema":
            raise UserError(f"checkpoint {path} has no averaged weights: use --which model")
        return averaged
    # mmengine exchanges the two before it saves, so that the averaged ones are what everybody loads
    if which != "model":
        return averaged
    if not isinstance(plain_ones, dict):
        raise UserError(f"checkpoint {path} holds a {type(plain_ones).__name__} as its plain weights")
    return {name: value for name, value in plain_ones.items() if name != "steps"}


def fit(model: nn.Module, content: dict[str, Any], path: str | Path, options: Options = _DEFAULT) -> dict[str, Tensor]:
    """`fitting_weights` of the content that `path` was read to."""
    weights = _set(content, path, options.which)
    named = isinstance(weights, dict) and weights and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"checkpoint {path} holds no state_dict, but: {', '.join(map(str, list(content)[:8]))}")
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    own = {n.removeprefix("backbone."): v for n, v in weights.items() if n.startswith("backbone.")}
    rest = {n: v for n, v in weights.items() if not n.startswith("backbone.")}
    if hasattr(model.backbone, "convert_state_dict"):  # names of older publications
        own = model.backbone.convert_state_dict(own)
    unneeded = getattr(model.backbone, "unneeded", ())
    weights = {**{f"backbone.{name}": value for name, value in own.items() if name not in unneeded}, **rest}
    own = model.state_dict()
    difference = describe_difference(weights, own) or describe_values(weights, own, options.allow_nonfinite)
    if difference:
        raise UserError(f"checkpoint {path} does not fit this {type(model).__name__}: {difference}")
    return weights
