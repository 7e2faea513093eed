"""Weights to start from or to evaluate: whose they are, which set of a file, and how they get into a network."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from timm.models._manipulate import adapt_input_conv
from torch import nn
from yacs.config import CfgNode as CN

import ssm_models
from ssm_models.weights import Entry, find, is_path
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import open_regular
from ssm_train.config.defaults import channels, replaced
from ssm_train.record.checkpoint import META, MODEL_EMA, best_or_itself, read_checkpoint
from ssm_train.step.model import build_model

# how messages of ssm_models call what the command line has flags for
_FLAGS = {
    "; new_head=True": ("; --new-head", ("--pretrained",)),
    "; allow_nonfinite=True": ("; --allow-nonfinite", ("--pretrained", "--checkpoint")),
}


class Pretrained(NamedTuple):
    """Weights as a user names them: the folder of a finished run (its best checkpoint) or of a checkpoint of ours, a
    .safetensors file, an official .pth file, or a name of the table of published weights."""

    path: Path
    which: str = "auto"
    """"model" or "ema"; "auto" takes the set that validated better, of a name the one it is published for."""
    new_head: bool = False
    """All but the classifier, for other classes."""
    allow_nonfinite: bool = False


class Loaded(NamedTuple):
    """Weights that were loaded."""

    name: str
    """As the user named them."""
    file: Path
    entry: str
    """Where in the file they were: "model", "state_dict", "model_ema", or "" for the file itself."""
    sets: tuple[str, ...]
    """The sets there were, "model" and "ema"."""
    fresh_classifier: bool
    ours: bool
    """Written by this trainer."""

    @property
    def taken(self) -> str:
        """Which of `sets` it was."""
        return "ema" if self.entry == "model_ema" or (self.ours and self.file.name == MODEL_EMA) else "model"

    def __str__(self) -> str:
        inside = f" ({self.entry})" if self.entry else ""
        there = f"; it holds {' and '.join(self.sets)} weights, taken: {self.taken}" if len(self.sets) > 1 else ""
        return f"{self.file}{inside}{there}{'; fresh classifier' * self.fresh_classifier}"

    def record(self) -> dict[str, Any]:
        """What config.yaml, metrics.json and report.md say of it."""
        digest = hashlib.sha256()
        with open_regular(self.file, follow=True) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return {
            "name": self.name,
            "file": str(self.file),
            "entry": self.entry,
            "sha256": digest.hexdigest(),
            "fresh_classifier": self.fresh_classifier,
        }


def published(name: Path, option: str = "--pretrained") -> Entry:
    """The classifier called `name` in the table of published weights. UserError where it has none."""
    try:
        entry = find(str(name))
    except ssm_models.CheckpointError as error:
        raise UserError(f"{option} {error}") from error
    if entry.task != "classification" or not entry.model:
        raise UserError(
            f"{option} {entry.name} is of {entry.model or 'a model that its authors do not describe'}, no classifier "
            "of this repository; `python -m ssm_models` lists those"
        )
    return entry


def load_pretrained(model: nn.Module, weights: Pretrained, option: str = "--pretrained") -> Loaded:
    """Load weights strictly. UserError says what is wrong with the value of `option`, naming the first differing
    keys."""
    path, which = weights.path, weights.which
    folder, sets = best_or_itself(path), None
    if (folder / META).is_file():
        checkpoint = read_checkpoint(folder)
        path, which, sets = checkpoint.file_of(which), "auto", ("model", "ema")[: 1 + checkpoint.has_ema]
    if is_path(path) and not path.is_file():
        raise UserError(
            f"{option} {path} is neither a file nor a folder of a finished run or checkpoint; give one of these, a "
            ".safetensors or .pth file, or a name that `python -m ssm_models` lists"
        )
    try:
        report = ssm_models.load_checkpoint(
            model, path, which=which, new_head=weights.new_head, allow_nonfinite=weights.allow_nonfinite
        )
    except ssm_models.CheckpointError as error:
        raise UserError(_in_flags(str(error), option)) from error
    there = tuple(dict.fromkeys("ema" if name == "model_ema" else "model" for name in report.entries))
    return Loaded(
        name=str(weights.path),
        file=report.file,
        entry=report.entry,
        sets=there if sets is None else sets,
        fresh_classifier=weights.new_head,
        ours=sets is not None,
    )


def _in_flags(message: str, option: str) -> str:
    """A message of ssm_models with the flags of commands that have `option`, in place of Python's arguments."""
    for argument, (flag, options) in _FLAGS.items():
        message, found, rest = message.partition(argument)
        message += f"{flag}{rest}" if found and option in options else ""
    return message


def start_from(model: nn.Module, cfg: CN, weights: Pretrained) -> Loaded:
    """`load_pretrained`; a grey network takes the weights of one for RGB, too, with the filters of its first layer
    summed over the colours: for a grey image in RGB they give the same (timm's rule)."""
    try:
        return load_pretrained(model, weights)
    except UserError as error:
        if channels(cfg) == 3:
            raise
        colour = build_model(replaced(cfg, {"MODEL.KWARGS.in_chans": 3}))
        try:
            loaded = load_pretrained(colour, weights)
        except UserError:
            raise error from None
    own = model.state_dict()
    summed = {
        name: value if value.shape == own[name].shape else adapt_input_conv(channels(cfg), value)
        for name, value in colour.state_dict().items()
    }
    model.load_state_dict(summed)
    return loaded
