"""The folder of a run: its lock, the config in it, its checkpoints and the links to them."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import FolderLock, folder_lock, write_atomic
from ssm_train.continuation import refuse_existing_run, set_aside
from ssm_train.data.sources import ImageSource, PhotoSource
from ssm_train.data.sources.photos import write_split
from ssm_train.record.checkpoint import Checkpoint, Position
from ssm_train.record.results import Results, better_weights, with_origin
from ssm_train.record.store import CheckpointStore
from ssm_train.step.state import first_nonfinite


class RunFolder:
    """The folder of a run. Every process knows it; rank 0 alone opens it and writes to it.

    Args:
        path: of the folder, which need not be there.
        keep: how many checkpoints stay beside those that a link points at.
        facts: what meta.json of all its checkpoints says alike, see record/meta.py: config, command, pretrained, data,
            classes, processes, asked_batch, images_per_update, versions.
    """

    def __init__(self, path: Path, keep: int, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.store = CheckpointStore(path / "checkpoints", keep)
        self._lock: FolderLock | None = None

    def open(self, checkpoint: Checkpoint | None, results: Results, fresh: bool, stack: contextlib.ExitStack) -> None:
        """Lock the folder until `stack` ends, and make it one that goes on from `checkpoint`, with its `results`, or
        one of a new run. What is in it is set aside first, if `fresh`.

        Raises UserError where another run is in it, or nothing can be written to it.
        """
        if fresh:
            set_aside(self.path)
        with self.writing():
            self._lock = stack.enter_context(folder_lock(self.path))
        if checkpoint is None:
            # again, now that nobody else can begin a run here
            refuse_existing_run(self.path)
            self.store.clean()
            return
        if checkpoint.folder.parent != self.store.folder.resolve():
            self.store.clean()
            self.store.adopt(checkpoint)
        self.store.open(checkpoint)
        results.forget_missing({position.epoch for position in self.store.positions() if not position.update})
        # A process that was killed after saving and before linking left the older links. By the checkpoint's own
        # position: with another batch, the run's may be no checkpoint's.
        self.store.link(_links(checkpoint.position, results))

    def write_config(self, splits: Mapping[str, ImageSource], root: str) -> None:
        """Write config.yaml and, for photographs, which of those in the folder `root` are in which split."""
        text = with_origin(self.facts["config"], self.facts["command"], self.facts["pretrained"])
        with self.writing():
            write_atomic(self.path / "config.yaml", text)
            if all(isinstance(source, PhotoSource) for source in splits.values()):
                write_split(self.path, dict(splits), root)

    def checkpoint(self, position: Position) -> Path:
        """Where the checkpoint of a position is, if there is one."""
        return self.store.folder / position.name

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises UserError for what the operating system does not let us write inside the block."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to run folder {self.path} ({error.strerror}): choose another --output"
            ) from error

    def is_gone(self) -> bool:
        """Whether an opened folder is no longer under its name."""
        return self._lock is not None and not self._lock.holds()

    def save(self, position: Position, results: Results, state: dict[str, Any], counts: Mapping[str, Any]) -> None:
        """Write a checkpoint and point the links at it.

        Args:
            state: what `step.state.collect` gave.
            counts: what meta.json says of this position, beside `facts`.

        Raises:
            UserError: `state` is not finite; the folder was replaced; or it was moved: then the checkpoint is saved
                where it is now.
        """
        # gradients were finite, but an update can still overflow
        cause = first_nonfinite(state)
        if cause:
            raise UserError(
                f"{cause} became infinite or nan before {position}; the last checkpoint is intact: lower "
                "TRAIN.BASE_LR and continue with --resume auto --allow-changes"
            )
        moved = self.is_gone()
        # never into a folder that somebody else has put there
        if moved and os.path.lexists(self.path):
            raise UserError(f"{self.path} was replaced while this run wrote to it: what it saved is where it was moved")
        latest = results.latest()
        weights = better_weights(latest) if latest else "model"
        self.store.save(
            position,
            model=state.pop("model"),
            ema=state.pop("ema"),
            train_state=state,
            meta={"results": results.records, "weights": weights, **counts, **self.facts},
        )
        self.store.link(_links(position, results))
        if moved:
            raise UserError(
                f"{self.path} was moved or removed while this run wrote to it; {position} is saved in "
                f"{self.checkpoint(position)}: move it back to the others, or continue here with --resume auto"
            )


def _links(position: Position, results: Results) -> dict[str, Position]:
    """Checkpoint links and where they point, with `position` the last one saved."""
    bests = {name: Position(epoch) for name, epoch in results.best_epochs().items()}
    return {"last": position, **bests}
