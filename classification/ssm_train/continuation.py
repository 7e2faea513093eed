"""What a run folder holds already, and which checkpoint a run goes on from: nothing is overwritten by accident."""

import argparse
import logging
import os
import time
from pathlib import Path

from yacs.config import CfgNode as CN

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import folder_lock
from ssm_train.config.load import model_differences, parse_config
from ssm_train.record.checkpoint import Checkpoint, Position, best_or_itself, read_checkpoint
from ssm_train.record.store import CheckpointStore

_log = logging.getLogger(__name__)

_TRACES = ("checkpoints", "log.jsonl", "log.txt", "metrics.json")


def traces(folder: Path) -> list[str]:
    """What `folder` holds of a run, in words; a process that was killed before its first checkpoint was complete leaves
    nothing that counts. UserError where the system does not let us know."""
    if not folder.is_dir():
        return [_kind(folder)] if os.path.lexists(folder) else []
    found = []
    for name in _TRACES:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if name != "checkpoints" or not path.is_dir():
            found.append(name if path.exists() else f"{name}, {_kind(path)}")
        elif CheckpointStore(path, 1).holds_anything():
            found.append(name)
    return found


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "a link that leads nowhere"


def refuse_existing_run(folder: Path) -> None:
    """UserError where `folder` holds a run that a new one would overwrite."""
    # what is no folder cannot be written to, which says so itself
    found = traces(folder) if folder.is_dir() else []
    if found:
        raise UserError(
            f"{folder} already holds a run ({', '.join(found)}): choose another --tag or --output, add --resume auto, "
            "or set that run aside with --fresh"
        )


def set_aside(folder: Path) -> None:
    """Give a run folder that nobody writes to another name, beside it. UserError where that cannot be."""
    folder = folder.resolve()
    if not folder.exists():
        return
    kept, number = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"), 1
    while os.path.lexists(kept):
        number += 1
        kept = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{number}")
    try:
        with folder_lock(folder):
            os.rename(folder, kept)
    except OSError as error:
        raise UserError(
            f"--fresh: {folder} cannot be moved to {kept} ({error.strerror}): choose another --output"
        ) from error
    _log.info("--fresh: the earlier run is kept in %s", kept)


def find_checkpoint(args: argparse.Namespace, cfg: CN, folder: Path) -> Checkpoint | None:
    """The checkpoint that --resume means, verified and for the configured model; None to start from scratch.

    Raises UserError where that would overwrite a run, also one of which nothing can be verified.
    """
    store = CheckpointStore(folder / "checkpoints", cfg.TRAIN.KEEP_CHECKPOINTS)
    checkpoint = _named(args) if args.resume != "auto" else store.newest_valid()
    if checkpoint is None:
        found = traces(folder)
        if args.eval and not args.pretrained:
            raise UserError(
                f"--resume auto: {store.folder} holds no valid checkpoint to evaluate; give --resume CHECKPOINT"
            )
        if found and not args.eval:
            raise UserError(
                f"--resume auto: {folder} holds {', '.join(found)}, but no valid checkpoint to continue from: give "
                "--resume CHECKPOINT and another --output, or set that run aside with --fresh"
            )
        _log.info("--resume auto: %s holds no run, starting from %s", folder, cfg.MODEL.PRETRAINED or "scratch")
        return None
    differing = model_differences(parse_config(checkpoint.meta["config"]), cfg)
    if differing:
        raise UserError(
            f"checkpoint {checkpoint.folder} is of another model than the config: {'; '.join(differing[:3])} "
            "(checkpoint -> config); use the config it was trained with"
        )
    if args.resume != "auto" and not args.eval:
        _check_continuation(checkpoint, store, folder)
    return checkpoint


def _named(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that --resume names. Of the folder of a run --eval means the best one; to go on is another
    thing."""
    path = Path(args.resume)
    return read_checkpoint(best_or_itself(path) if args.eval else path)


def _check_continuation(checkpoint: Checkpoint, store: CheckpointStore, folder: Path) -> None:
    """UserError where continuing from `checkpoint` in `folder` would overwrite later epochs or mix two runs."""
    if checkpoint.folder.parent != store.folder.resolve():
        refuse_existing_run(folder)
    newest = max(store.positions(), default=Position(0))
    if newest > checkpoint.position:
        raise UserError(
            f"{store.folder} goes on to {newest}; resuming from {checkpoint.position} would overwrite that: choose "
            "another --tag or --output for the new branch, or use --resume auto"
        )
