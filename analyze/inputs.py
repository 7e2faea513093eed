"""What the commands of this folder have in common: models, weights, devices and outputs as users name them. Images:
image_files.py.

Everything that a user can get wrong raises UserError.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from rich.console import Console
from rich.progress import Progress, track
from timm.data import create_transform, resolve_data_config
from torch import nn
from yacs.config import CfgNode as CN

from ssm_models import CheckpointError
from ssm_models import read_checkpoint as read_weights
from ssm_models.weights import is_path
from ssm_train.common.errors import UserError
from ssm_train.config.load import parse_config
from ssm_train.data.transforms import Transform, eval_transform
from ssm_train.record.checkpoint import META, best_or_itself, read_checkpoint
from ssm_train.step.model import check_model_name
from ssm_train.step.pretrained import Pretrained, load_pretrained, published

T = TypeVar("T")


def find_device(name: str) -> torch.device:
    """The device called `name`; "" is CUDA where there is one."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device of PyTorch; use cpu or cuda") from error


def device_name(device: torch.device) -> str:
    """What numbers of throughput depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def build_model(name: str, num_classes: int | None = None, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A registered model of timm, ours included, in evaluation mode, with `num_classes` (its own number if None) and
    `arguments` of its constructor."""
    check_model_name(name, "model")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return timm.create_model(name, **classes, **(arguments or {})).eval()
    except (TypeError, ValueError) as error:
        raise UserError(f"model {name} cannot be built: {error}") from error


def load_model(
    name: str, checkpoint: Path | None = None, which: str = "auto", allow_nonfinite: bool = False
) -> nn.Module:
    """`build_model` with the weights of `checkpoint`, as many classes as these are for; random weights if None.

    `checkpoint`, `which` and `allow_nonfinite` are what `Pretrained` says. UserError also where it is of another model.
    """
    check_weights(name, checkpoint)
    if checkpoint is None:
        return build_model(name)
    if not is_path(checkpoint):
        return _loaded(build_model(name), Pretrained(checkpoint, which, allow_nonfinite=allow_nonfinite))
    cfg = run_config(checkpoint)
    classes = _classes_in(weights_file(checkpoint), name) if cfg is None else cfg.MODEL.NUM_CLASSES
    model = build_model(name, classes, None if cfg is None else cfg.MODEL.KWARGS)
    return _loaded(model, Pretrained(checkpoint, which, allow_nonfinite=allow_nonfinite))


def check_weights(name: str, checkpoint: Path | None) -> None:
    """UserError for a model that is not there and for weights that are not, or not of that model, as far as that is
    seen without reading them: for commands that load several, before they begin with the first."""
    check_model_name(name, "model")
    if checkpoint is None:
        return
    if not is_path(checkpoint):
        published(checkpoint, "--checkpoint")
        return
    weights_file(checkpoint)
    cfg = run_config(checkpoint)
    if cfg is not None and name != cfg.MODEL.NAME:
        raise UserError(f"--checkpoint {checkpoint} is of the model {cfg.MODEL.NAME}, not of {name}")


def load_pretrained_timm(name: str) -> nn.Module:
    """A registered model with the weights that timm downloads for it, in evaluation mode. UserError where it has none,
    or they cannot be had."""
    check_model_name(name, "model")
    try:
        return timm.create_model(name, pretrained=True).eval()
    except (RuntimeError, OSError) as error:  # none are published; huggingface_hub's and the network's are OSErrors
        raise UserError(f"--pretrained: no weights of {name} to be had: {error}") from error


def _loaded(model: nn.Module, weights: Pretrained) -> nn.Module:
    loaded = load_pretrained(model, weights, option="--checkpoint")
    if loaded.ours and len(loaded.sets) > 1:
        print(f"weights from {loaded}", file=sys.stderr)
    return model.eval()


def model_name(name: str | None, checkpoint: Path | None) -> str:
    """`name`, or that of the model in a checkpoint of ours where it is None."""
    if name is not None:
        return name
    if checkpoint is not None and not is_path(checkpoint):
        return published(checkpoint, "--checkpoint").model
    if checkpoint is not None and not checkpoint.exists():
        raise UserError(f"--checkpoint {checkpoint} does not exist")
    cfg = run_config(checkpoint)
    if cfg is None:
        raise UserError("give --model NAME: only the checkpoints of runs of this repository know their model")
    return cfg.MODEL.NAME


def weights_in_words(checkpoint: Path | None) -> str:
    """What pictures call the weights of a model."""
    return "random weights" if checkpoint is None else checkpoint.name


def knows_its_model(checkpoint: Path) -> bool:
    """Is it a published name, or a checkpoint of ours, so that no --model is needed?"""
    return not is_path(checkpoint) or run_config(checkpoint) is not None


def run_config(checkpoint: Path | None) -> CN | None:
    """The config of the run that wrote a checkpoint or run folder of ours; None for any other file."""
    if checkpoint is None:
        return None
    folder = best_or_itself(checkpoint)
    return parse_config(read_checkpoint(folder).meta["config"]) if (folder / META).is_file() else None


def weights_file(checkpoint: Path, option: str = "--checkpoint") -> Path:
    """The file that holds the weights of what `load_model` takes; `option` is what the user calls it."""
    folder = best_or_itself(checkpoint)
    if (folder / META).is_file():
        return read_checkpoint(folder).weights_file
    if not folder.is_file():
        raise UserError(
            f"{option} {checkpoint} is neither a file nor a folder of a finished run or checkpoint; give one of "
            "these, a .safetensors or a .pth file"
        )
    return folder


def _classes_in(file: Path, name: str) -> int | None:
    """The rows of the classifier's weight in `file`; None where it has none under the model's name for it."""
    try:
        weights = read_weights(file)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    names = timm.get_pretrained_cfg(name, allow_unregistered=False)
    classifier = names.classifier if isinstance(names.classifier, str) else names.classifier[0]
    weight = weights.get(f"{classifier}.weight")
    return None if weight is None else weight.shape[0]


def image_size(asked: Sequence[int] | None, name: str, checkpoint: Path | None) -> tuple[int, int]:
    """(H, W): what the user asked for (H, or H and W), else that of the run, else the model's own."""
    cfg = run_config(checkpoint)
    if asked is None:
        return timm.get_pretrained_cfg(name).input_size[1:] if cfg is None else (cfg.DATA.IMG_SIZE,) * 2
    if len(asked) > 2 or min(asked) < 1:
        raise UserError(f"--size {' '.join(map(str, asked))} is not H or H W, in pixels")
    return asked[0], asked[-1]


@torch.inference_mode()
def check_image_size(model: nn.Module, name: str, size: tuple[int, int], count: int = 3) -> None:
    """UserError where `model`, called `name`, does not take images of this size with `count` channels."""
    try:
        model(torch.zeros(1, count, *size, device=next(model.parameters()).device))
    except (ValueError, RuntimeError) as error:  # the latter: PyTorch's, of a map smaller than a convolution
        raise UserError(f"{name} takes no images of {size[0]}x{size[1]} pixels: {error}") from error


def evaluation_transform(name: str, checkpoint: Path | None, size: int | None = None) -> Transform:
    """Image -> normalised fp32 tensor (C, S, S), as in the evaluation of the run that wrote `checkpoint`, else as
    model `name` is evaluated by its authors (timm: shorter side to S / crop_pct, centre crop). `size` replaces S."""
    if size is not None and size < 1:
        raise UserError(f"--size {size} is not a number of pixels")
    cfg = run_config(checkpoint)
    if cfg is None:
        check_model_name(name, "model")
        settings = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        shape = settings["input_size"] if size is None else (3, size, size)
        return create_transform(**{**settings, "input_size": shape})
    if size is not None:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATA.IMG_SIZE = size
    return eval_transform(cfg)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """`items`, with a bar on the terminal (stderr) while they are worked on."""
    return track(items, what, total, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)


def progress_bar() -> Progress:
    """On the terminal (stderr), if there is one; for work in several parts."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def at_least(lowest: float, **options: float | Iterable[float]) -> None:
    """UserError for an option with a number below `lowest`."""
    for name, given in options.items():
        for value in given if isinstance(given, Iterable) else [given]:
            if not value >= lowest:
                raise UserError(f"--{name} {value} must be at least {lowest}")


def check_writable(out: Path) -> None:
    """UserError for an output that could not be written after the work, before it."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: choose another path")
    folder = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {folder} is no folder that can be written to; choose another path")
    if out.exists() and not os.access(out, os.W_OK):
        raise UserError(f"--out {out} cannot be overwritten; choose another path")


def make_folder(folder: Path) -> Path:
    """The folder, made if it is not there. UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder
