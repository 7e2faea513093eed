"""The checkpoints of a run: saved whole, found again after any kill, and never removed unless a newer one is whole.

A checkpoint is written into .tmp-NAME, every file is fsynced, then the folder is renamed to NAME. Where a NAME is there
already, it waits as .old-NAME until the new one has its place; after a kill between the two renames there is no NAME,
and whichever of them is complete, the new one first, counts in its stead. What is no longer kept becomes .gone-NAME
before it is removed, so that a half-removed folder never looks like a checkpoint. What is in the way and is not known
to be superseded is kept as unverified_NAME.
"""

import contextlib
import errno
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import ASIDE, is_disk_full, link_atomic, open_regular, sync_folder, to_json, write_synced
from ssm_train.record.checkpoint import (
    META,
    MODEL,
    MODEL_EMA,
    SUMS,
    TRAIN_STATE,
    Checkpoint,
    Position,
    Weights,
    read_checkpoint,
)
from ssm_train.record.meta import FORMAT

_log = logging.getLogger(__name__)

LINKS = ("last", "best", "best_ema")
_NEW, _OLD, _GONE, _UNVERIFIED = ASIDE, ".old-", ".gone-", "unverified_"

# what a file says by being missing or no regular file; any other error of the system says nothing of a checkpoint
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO}


class CheckpointStore:
    """The `checkpoints` folder of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def positions(self) -> dict[Position, Path]:
        """Checkpoint folders by position, oldest first; complete by construction, but not verified."""
        found = {}
        for path in self._entries():
            named = path.with_name(path.name.removeprefix(_OLD))
            position = Position.named(named.name)
            if position is not None and path.is_dir() and not path.is_symlink():
                found[position] = named if named.is_dir() else path
        return dict(sorted(found.items()))

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        except OSError as error:
            raise UserError(f"cannot list {self.folder} ({error.strerror}): make it readable") from error

    def holds_anything(self) -> bool:
        """Whether there is more than what a process that was killed while it saved for the first time leaves."""
        return any(not path.name.startswith(_NEW) for path in self._entries())

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint whose files are as they were written, under its own name or as a copy where a link was;
        damaged ones, and what only looks like one, are named in the log and skipped."""
        for path in self._entries():
            if path.name.startswith("epoch_") and (path.is_symlink() or not path.is_dir()):
                kind = "a link" if path.is_symlink() else "a file"
                _log.warning("skipping %s: %s, not a folder of a checkpoint", path, kind)
        names = [path.name.removeprefix(_OLD) for path in reversed(self.positions().values())]
        found = next(filter(None, (self._valid(path) for name in names for path in self._candidates(name))), None)
        copies = [found, *(self._valid(path) for path in self._copies())]
        return max(filter(None, copies), key=lambda checkpoint: checkpoint.position, default=None)

    def _valid(self, path: Path) -> Checkpoint | None:
        try:
            return read_checkpoint(path)
        except UserError as error:
            _log.warning("skipping a damaged checkpoint: %s", error)
            return None

    def _copies(self) -> list[Path]:
        """Folders where links should be: what `cp -rL`, `scp -r` and object stores make of them."""
        return [path for path in (self.folder / name for name in LINKS) if path.is_dir() and not path.is_symlink()]

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
                _remove(path)

    def _finish_replacement(self, name: str) -> None:
        """Give `name` to the first complete one of its candidates, so that the others can go; without one, to what was
        set aside, if nothing else has it."""
        final, old = self.folder / name, self.folder / f"{_OLD}{name}"
        best = next(filter(_is_complete, self._candidates(name)), None)
        if best is None and os.path.lexists(final):
            self._keep_unverified(old, name)
        elif best != final:
            if os.path.lexists(final):
                # damaged after it was complete, and another one of this position is complete
                self._set_gone(final)
            os.rename(best or old, final)
            sync_folder(self.folder)

    def open(self, start: Checkpoint) -> None:
        """For a run that goes on from `start`, which is of this folder: copies become what they are copies of, and what
        is newer than `start` and cannot be verified is kept out of the way. UserError where it can be: another process
        has gone on in the meantime."""
        self.clean()
        for copy in self._copies():
            position = read_checkpoint(copy).position if _is_complete(copy) else None
            if position is None:
                self._keep_unverified(copy, copy.name)
                continue
            final = self.folder / position.name
            if os.path.lexists(final) and not _is_complete(final):
                self._keep_unverified(final, final.name)
            if final.exists():
                _remove(self._set_gone(copy))
            else:
                os.rename(copy, final)
                sync_folder(self.folder)
        for name in LINKS:
            if (self.folder / name).is_file() and not (self.folder / name).is_symlink():
                self._keep_unverified(self.folder / name, name)
        for path in self._entries():
            position = Position.named(path.name)
            if position is None or position <= start.position:
                continue
            if _is_complete(path):
                raise UserError(
                    f"{self.folder} goes on to {position} since it was looked at: run this command again, to continue "
                    "from there"
                )
            self._keep_unverified(path, path.name)

    def _keep_unverified(self, path: Path, name: str) -> None:
        kept, number = self.folder / f"{_UNVERIFIED}{name}", 1
        while os.path.lexists(kept):
            number += 1
            kept = self.folder / f"{_UNVERIFIED}{name}_{number}"
        os.rename(path, kept)
        sync_folder(self.folder)
        _log.warning("%s is in the way and could not be verified: it is kept as %s", path, kept.name)

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
                META: to_json({"format": FORMAT, **position._asdict(), **meta}, indent=1).encode(),
            }
            sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
            for name, data in {**files, SUMS: sums.encode()}.items():
                write_synced(folder / name, data)
        return self.folder / position.name

    def adopt(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint of another run, so that a run that continues it is complete in its own folder."""
        with self._new_folder(checkpoint.position.name) as folder:
            for name in (*checkpoint.files, SUMS):
                with open_regular(checkpoint.folder / name) as file:
                    write_synced(folder / name, file.read())

    def link(self, positions: dict[str, Position]) -> None:
        """Point the links (last, best, best_ema) at their checkpoints, then remove old ones that have no link, and the
        one of the start as soon as there is another."""
        for name, position in positions.items():
            link = self.folder / name
            linked = link.is_symlink() and os.readlink(link) == position.name
            if not linked and not link_atomic(link, position.name):
                self._copy(self.folder / position.name, link)
        everything = list(self.positions().items())
        for number, (position, path) in enumerate(everything, 1):
            superseded = number <= len(everything) - self._keep or position == Position(0)
            if superseded and position not in positions.values():
                _remove(self._set_gone(path))

    def _copy(self, folder: Path, link: Path) -> None:
        """Where there are no links to folders: a folder of the same files, which is what copying a run makes of a link.
        A kill on the way leaves none, and the run that goes on makes it again."""
        if (link / META).is_file() and os.path.samefile(link / META, folder / META):
            return
        new = self.folder / f"{_NEW}{link.name}"
        new.mkdir()
        for path in folder.iterdir():
            try:
                os.link(path, new / path.name)
            except OSError:  # not even links to files
                shutil.copyfile(path, new / path.name)
        if os.path.lexists(link):
            _remove(self._set_gone(link))
        os.rename(new, link)
        sync_folder(self.folder)

    @contextlib.contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        """A folder to fill: it gets its name when all is in it and on the disk, or disappears."""
        final, new, old = (self.folder / f"{prefix}{name}" for prefix in ("", _NEW, _OLD))
        self.clean()
        try:
            new.mkdir(parents=True)
            yield new
            sync_folder(new)
            if os.path.lexists(final):  # of an abandoned attempt
                if _is_complete(final):
                    os.rename(final, old)
                else:
                    self._keep_unverified(final, name)
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_complete(folder: Path) -> bool:
    """Whether all is in `folder` as it was written. UserError where the system does not let us know."""
    if folder.is_symlink():
        return False
    try:
        read_checkpoint(folder)
    except UserError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in _NOT_THERE:
            raise
        return False
    return True
