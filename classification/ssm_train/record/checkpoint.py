"""Checkpoints: folders of data that are complete or absent, and are never executed.

    checkpoints/epoch_0007/model.safetensors      weights after 7 epochs
                           model_ema.safetensors  averaged weights, if kept
                           train_state.pt         optimizer, scaler, update count; read as data only
                           meta.json              epoch, update, results, config text, data, versions: meta.py
                           SHA256SUMS             of the other files, for us and for `sha256sum -c`
    checkpoints/epoch_0007_update_000500/         the same, 500 updates into the next epoch
    checkpoints/last, best, best_ema              relative links, or copies where links were followed

Only regular files are read, and only those that SHA256SUMS lists: no links, pipes or devices. record/store.py writes
and finds these folders.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ssm_models.checkpoint import CheckpointError, describe_difference, describe_values
from ssm_models.unpickle import read_pickle
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import open_regular
from ssm_train.record.meta import parse_meta

MODEL, MODEL_EMA, TRAIN_STATE, META = "model.safetensors", "model_ema.safetensors", "train_state.pt", "meta.json"
SUMS = "SHA256SUMS"
_NAME = re.compile(r"epoch_(\d{1,18})(?:_update_(\d{1,18}))?")
_MOST_SUMS, _MOST_META = 1 << 16, 1 << 26  # bytes
_MOST_UPDATES = 1 << 63


class Position(NamedTuple):
    """How far a run has come: `epoch` complete epochs, validated, and `update` update slots of the next one.

    A slot counts whether its update was made or skipped, so the position says which images come next. With all slots of
    an epoch behind it, its validation comes next.
    """

    epoch: int
    update: int = 0

    @property
    def name(self) -> str:
        """The folder name of a checkpoint."""
        return f"epoch_{self.epoch:04d}" + (f"_update_{self.update:06d}" if self.update else "")

    @staticmethod
    def named(name: str) -> "Position | None":
        """The position of a folder name; None for any other."""
        match = _NAME.fullmatch(name)
        return Position(int(match[1]), int(match[2] or 0)) if match else None

    def __str__(self) -> str:
        return f"epoch {self.epoch}" + (f" and {self.update} updates" if self.update else "")


Weights = dict[str, torch.Tensor]  # by parameter or buffer name, on the CPU, contiguous


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    meta: dict[str, Any]
    files: tuple[str, ...]
    """What SHA256SUMS lists."""

    @property
    def position(self) -> Position:
        return Position(self.meta["epoch"], self.meta["update"])

    @property
    def has_ema(self) -> bool:
        return MODEL_EMA in self.files

    @property
    def weights_file(self) -> Path:
        """The file to start from: the plain or the averaged weights, whichever validated better when it was written."""
        return self.folder / f"{self.meta['weights']}.safetensors"

    def file_of(self, which: str) -> Path:
        """The file of the plain ("model") or the averaged weights ("ema"), or `weights_file` for "auto". UserError
        where there are no averaged ones."""
        if which == "ema" and not self.has_ema:
            raise UserError(f"{self.folder} has no averaged weights: use --which model")
        return {"auto": self.weights_file, "model": self.folder / MODEL, "ema": self.folder / MODEL_EMA}[which]

    def weights(self, name: str, model: nn.Module) -> Weights:
        """The tensors of file `name` (MODEL or MODEL_EMA); UserError names the keys in which `model` differs."""
        try:
            tensors = load_file(self.folder / name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / name} is no safetensors file: {error}; use another checkpoint") from error
        own = model.state_dict()
        difference = describe_difference(tensors, own)
        if difference:
            raise UserError(
                f"{self.folder / name} is of another model: {difference}; use the config it was trained with"
            )
        # converted weights would not end in the same bits
        odd = next((key for key, value in tensors.items() if value.dtype != own[key].dtype), None)
        fault = describe_values(tensors, own) if odd is None else f"{odd} is {tensors[odd].dtype}, not {own[odd].dtype}"
        if fault:
            raise UserError(
                f"{self.folder / name}: {fault}; use another checkpoint, or start anew from this file by --pretrained"
            )
        return tensors

    def train_state(self) -> dict[str, Any]:
        """The content of train_state.pt: tensors, numbers and names only. UserError for anything else."""
        try:
            state = read_pickle(self.folder / TRAIN_STATE)
        except CheckpointError as error:
            raise UserError(f"{error}; use another checkpoint") from error
        if isinstance(state, dict):
            # format 0 did not say of which parameters the optimizer remembers nothing
            state = {"stateless": [], **state}
            if _is_train_state(state):
                return state
        raise UserError(f"{self.folder / TRAIN_STATE} holds no state of a training; use another checkpoint")


def _is_train_state(state: dict[Any, Any]) -> bool:
    """Whether every part is there and of its kind, down to names, tensors and numbers."""
    optimizer, stateless, scaler, updates = map(state.get, ("optimizer", "stateless", "scaler", "updates"))
    return (
        _is_map(optimizer, dict)
        and all(_is_map(tensors, torch.Tensor) for tensors in optimizer.values())
        and isinstance(stateless, list)
        and all(isinstance(name, str) for name in stateless)
        and _is_map(scaler, object)
        and type(updates) is int
        and 0 <= updates < _MOST_UPDATES
    )


def _is_map(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())


def best_or_itself(path: Path) -> Path:
    """The best checkpoint of the run folder `path`, else `path` itself."""
    best = path / "checkpoints" / "best"
    return best if (best / META).is_file() else path


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder (or a link to one) and verify every file. UserError says what is missing or damaged."""
    try:
        folder = folder.resolve()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError):  # links that lead back to themselves
        is_folder = False
    if not is_folder:
        raise UserError(f"{folder} is not a checkpoint folder; give e.g. OUTPUT/checkpoints/last or --resume auto")
    try:
        # not splitlines(), which takes more characters than ours for the end of a line
        *lines, rest = _content(folder / SUMS, _MOST_SUMS).decode("ascii").split("\n")
        if rest:
            raise ValueError("it has no end")
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        for name in (MODEL, TRAIN_STATE, META):
            if name not in sums:
                raise UserError(f"{folder} is damaged ({SUMS} does not list {name}); use another checkpoint")
        for name, digest in sums.items():
            if Path(name).name != name:
                raise UserError(f"{folder} is damaged ({SUMS} lists {name!r}, which is not in it); use another one")
            if _digest(folder / name) != digest:
                raise UserError(f"{folder} is damaged ({name} is not what was saved); use another checkpoint")
        content = _content(folder / META, _MOST_META)
    except OSError as error:
        missing = Path(error.filename or folder).name
        raise UserError(f"{folder} is no complete checkpoint ({missing}: {error.strerror}); use another one") from error
    except ValueError as error:
        raise UserError(f"{folder} is damaged ({SUMS}: {error}); use another checkpoint") from error
    try:
        meta = parse_meta(content)
    except UserError as error:
        raise UserError(f"{folder} cannot be used: its {META} {error}; use another checkpoint") from error
    if f"{meta['weights']}.safetensors" not in sums:
        raise UserError(f"{folder} is damaged ({META} names {meta['weights']}, which is not there); use another one")
    return Checkpoint(folder, meta, tuple(sums))


def _content(path: Path, most: int) -> bytes:
    """Of a small file. ValueError where it has more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path.name} has more than {most} bytes")
    return content


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
