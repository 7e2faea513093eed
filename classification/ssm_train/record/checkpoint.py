"""Checkpoints: folders of data that are complete or absent, and are never executed.

    checkpoints/epoch_0007/model.safetensors      weights after 7 epochs
                           model_ema.safetensors  averaged weights, if kept
                           train_state.pt         optimizer, scaler, update count; read as data only
                           meta.json              epoch, update, best and last results, config text, versions
                           SHA256SUMS             of the other files, for us and for `sha256sum -c`
    checkpoints/epoch_0007_update_000500/         the same, 500 updates into the next epoch
    checkpoints/last, best, best_ema              relative links

A checkpoint is written into .tmp-NAME, every file is fsynced, then the folder is renamed to NAME. Where a NAME is there
already, it waits as .old-NAME until the new one has its place; after a kill between the two renames there is no NAME,
and whichever of them is complete, the new one first, counts in its stead. What is no longer kept becomes .gone-NAME
before it is removed, so that a half-removed folder never looks like a checkpoint.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ssm_models.checkpoint import CheckpointError, describe_difference
from ssm_models.unpickle import read_pickle
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import ASIDE, is_disk_full, link_atomic, sync_folder, write_synced

_log = logging.getLogger(__name__)

MODEL, MODEL_EMA, TRAIN_STATE, META = "model.safetensors", "model_ema.safetensors", "train_state.pt", "meta.json"
_SUMS = "SHA256SUMS"
_NAME = re.compile(r"epoch_(\d+)(?:_update_(\d+))?")
_NEW, _OLD, _GONE = ASIDE, ".old-", ".gone-"


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

    def __str__(self) -> str:
        return f"epoch {self.epoch}" + (f" and {self.update} updates" if self.update else "")


Weights = dict[str, torch.Tensor]  # by parameter or buffer name, on the CPU, contiguous


class CheckpointStore:
    """The `checkpoints` folder of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def positions(self) -> dict[Position, Path]:
        """Checkpoint folders by position, oldest first; complete by construction, but not verified."""
        if not self.folder.is_dir():
            return {}
        found = {}
        for path in self.folder.iterdir():
            named = path.with_name(path.name.removeprefix(_OLD))
            match = _NAME.fullmatch(named.name)
            if match and path.is_dir() and not path.is_symlink():
                found[Position(int(match[1]), int(match[2] or 0))] = named if named.is_dir() else path
        return dict(sorted(found.items()))

    def newest_valid(self) -> "Checkpoint | None":
        """The newest checkpoint whose files are as they were written; damaged ones are named in the log and skipped."""
        for path in reversed(self.positions().values()):
            for candidate in self._candidates(path.name.removeprefix(_OLD)):
                try:
                    return read_checkpoint(candidate)
                except UserError as error:
                    _log.warning("skipping a damaged checkpoint: %s", error)
        return None

    def _candidates(self, name: str) -> list[Path]:
        """The folders that may count as the checkpoint `name`, best first: several while one replaces the other."""
        final, new, old = (self.folder / f"{prefix}{name}" for prefix in ("", _NEW, _OLD))
        # one that is written for the first time does not count before it has its name
        return [path for path in (final, new, old) if path.is_dir()] if old.is_dir() else [final]

    def clean(self) -> None:
        """Put back what a replacement that was killed had set aside, and remove what is half-written or superseded."""
        for old in self.folder.glob(f"{_OLD}*"):
            self._finish_replacement(old.name.removeprefix(_OLD))
        for prefix in (_NEW, _OLD, _GONE):
            for path in self.folder.glob(f"{prefix}*"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _finish_replacement(self, name: str) -> None:
        """Give `name` to the first complete one of its candidates, so that the others can go."""
        final = self.folder / name
        best = next(filter(_is_complete, self._candidates(name)), final)
        if best != final:
            if final.exists():
                # damaged after it was complete
                self._set_gone(final)
            os.rename(best, final)
            sync_folder(self.folder)

    def _set_gone(self, path: Path) -> Path:
        gone = path.with_name(f"{_GONE}{path.name}")
        os.rename(path, gone)
        return gone

    def save(
        self,
        position: Position,
        *,
        model: Weights,
        ema: Weights | None,
        train_state: dict[str, Any],
        meta: dict[str, Any],
    ) -> Path:
        """Write a checkpoint. What was there before survives any failure. Raises UserError when the disk is full."""
        with self._new_folder(position.name) as folder:
            # all is serialised in memory and written by us, because torch.save and safetensors report a full disk as
            # errors of their own kinds
            state = io.BytesIO()
            torch.save(train_state, state)
            files: dict[str, bytes] = {MODEL: save(model)}
            if ema is not None:
                files[MODEL_EMA] = save(ema)
            # not getbuffer(): if writing fails, Python 3.12.1 crashes when it collects an exported buffer
            files |= {
                TRAIN_STATE: state.getvalue(),
                META: json.dumps({**position._asdict(), **meta}, indent=1).encode(),
            }
            sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
            for name, data in {**files, _SUMS: sums.encode()}.items():
                write_synced(folder / name, data)
        return self.folder / position.name

    def adopt(self, checkpoint: "Checkpoint") -> None:
        """Copy a checkpoint of another run, so that a run that continues it is complete in its own folder."""
        with self._new_folder(checkpoint.position.name) as folder:
            for file in filter(Path.is_file, checkpoint.folder.iterdir()):
                write_synced(folder / file.name, file.read_bytes())

    def link(self, positions: dict[str, Position]) -> None:
        """Point the links (last, best, best_ema) at their checkpoints, then remove old ones that have no link."""
        for name, position in positions.items():
            link = self.folder / name
            if not link.is_symlink() or os.readlink(link) != position.name:
                link_atomic(link, position.name)
        for position, path in list(self.positions().items())[: -self._keep]:
            if position not in positions.values():
                shutil.rmtree(self._set_gone(path))

    @contextlib.contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        """A folder to fill: it gets its name when all is in it and on the disk, or disappears."""
        final, new, old = (self.folder / f"{prefix}{name}" for prefix in ("", _NEW, _OLD))
        self.clean()
        try:
            new.mkdir(parents=True)
            yield new
            sync_folder(new)
            if final.exists():  # damaged, or of an abandoned attempt
                os.rename(final, old)
            os.rename(new, final)
            sync_folder(self.folder)
            if old.exists():
                shutil.rmtree(old)
        except OSError as error:
            if old.exists() and not final.exists():
                os.rename(old, final)
            shutil.rmtree(new, ignore_errors=True)
            if not is_disk_full(error):
                raise
            raise UserError(
                f"no room left to save {name} in {self.folder} ({error.strerror}); the checkpoints there, up to "
                f"{max(self.positions(), default=Position(0))}, are intact: free some space and continue with "
                "--resume auto"
            ) from error


def _is_complete(folder: Path) -> bool:
    """Whether all is in `folder` as it was written. UserError where the system does not let us know."""
    try:
        read_checkpoint(folder)
    except UserError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        return False
    return True


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    meta: dict[str, Any]

    @property
    def position(self) -> Position:
        return Position(self.meta["epoch"], self.meta["update"])

    @property
    def has_ema(self) -> bool:
        return (self.folder / MODEL_EMA).exists()

    @property
    def weights_file(self) -> Path:
        """The file to start from: the plain or the averaged weights, whichever validated better when it was written."""
        return self.folder / f"{self.meta['weights']}.safetensors"

    def weights(self, name: str, model: nn.Module) -> Weights:
        """The tensors of file `name` (MODEL or MODEL_EMA); UserError names the keys in which `model` differs."""
        try:
            tensors = load_file(self.folder / name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / name} is no safetensors file: {error}; use another checkpoint") from error
        difference = describe_difference(tensors, model.state_dict())
        if difference:
            raise UserError(
                f"{self.folder / name} is of another model: {difference}; use the config it was trained with"
            )
        return tensors

    def train_state(self) -> dict[str, Any]:
        """The content of train_state.pt: tensors, numbers and names only. UserError for anything else."""
        try:
            state = read_pickle(self.folder / TRAIN_STATE)
        except CheckpointError as error:
            raise UserError(f"{error}; use another checkpoint") from error
        match state:
            case {"optimizer": dict(parameters), "scaler": dict(), "updates": int()} if all(
                isinstance(value, dict) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
                for value in parameters.values()
            ):
                return state
        raise UserError(f"{self.folder / TRAIN_STATE} holds no state of a training; use another checkpoint")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder (or a link to one) and verify every file. UserError says what is missing or damaged."""
    folder = folder.resolve()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a checkpoint folder; give e.g. OUTPUT/checkpoints/last or --resume auto")
    try:
        # not splitlines(), which takes more characters than ours for the end of a line
        *lines, rest = (folder / _SUMS).read_bytes().decode("ascii").split("\n")
        if rest:
            raise ValueError("it has no end")
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        for name in (MODEL, TRAIN_STATE, META):
            if name not in sums:
                raise UserError(f"{folder} is damaged ({_SUMS} does not list {name}); use another checkpoint")
        for name, digest in sums.items():
            if Path(name).name != name:
                raise UserError(f"{folder} is damaged ({_SUMS} lists {name!r}, which is not in it); use another one")
            if _digest(folder / name) != digest:
                raise UserError(f"{folder} is damaged ({name} is not what was saved); use another checkpoint")
        meta = json.loads((folder / META).read_text())
        if not isinstance(meta, dict) or not all(type(meta.get(name)) is int for name in Position._fields):
            raise UserError(f"{folder} is damaged ({META} has no position); use another checkpoint")
    except RecursionError as error:
        raise UserError(f"{folder} is damaged ({META} is nested too deeply); use another checkpoint") from error
    except OSError as error:
        missing = Path(error.filename or folder).name
        raise UserError(f"{folder} is no complete checkpoint ({missing}: {error.strerror}); use another one") from error
    except ValueError as error:
        raise UserError(f"{folder} is damaged ({_SUMS}: {error}); use another checkpoint") from error
    return Checkpoint(folder, meta)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
