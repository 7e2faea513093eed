"""Whether all processes, and all parts of a run that is resumed, see the same data and use the same options."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.config.defaults import default_config, flattened
from ssm_train.config.load import parse_config
from ssm_train.data.sources import ImageSource
from ssm_train.record.checkpoint import Checkpoint

_log = logging.getLogger(__name__)

# Options that change no result, or but by the rounding of another device: where things are, how they are shown, kept
# and computed, what it began with, when a run gives up. The batch counts by the images per update; the data by what is
# in them.
_FREE = {
    *("OUTPUT", "TAG", "PRINT_FREQ", "WANDB", "DEVICE", "COMPILE", "CHANNELS_LAST", "PARALLEL"),
    *("MEMORY_SHARE", "TIMEOUT", "MODEL.PRETRAINED", "MODEL.NEW_HEAD", "TRAIN.UPDATES"),
    *("DATA.DATA_PATH", "DATA.DATASET", "DATA.CACHE_MODE", "DATA.NUM_WORKERS", "DATA.MAX_BAD_SHARE"),
    *("DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS", "TRAIN.USE_CHECKPOINT", "TRAIN.SAVE_UPDATES"),
    *("TRAIN.KEEP_CHECKPOINTS", "TRAIN.MAX_NONFINITE", "TRAIN.MAX_ROLLBACKS"),
}
_WORDS = {
    "images": "{split} images",
    "classes": "{split} classes",
    "class_names": "names or order of the {split} classes",
    "image_names": "names, order or labels of the {split} images",
}
_MOST_SHOWN = 5


def fingerprint(source: ImageSource, root: Path) -> dict[str, int | str]:
    """What tells one split from another: counts, and hashes of names and labels. It does not depend on where the data
    lie, which is in `root`."""
    folder = f"{root}/"
    names, labels = hashlib.sha256(source.targets.tobytes()), source.targets
    for index in range(len(labels)):
        names.update(source.name(index).removeprefix(folder).encode("utf-8", "backslashreplace") + b"\0")
    classes = hashlib.sha256("\0".join(source.classes).encode("utf-8", "backslashreplace"))
    return {
        "images": len(labels),
        "classes": len(source.classes),
        "class_names": classes.hexdigest(),
        "image_names": names.hexdigest(),
    }


def check_ranks(world: World, cfg: CN, data: dict[str, dict]) -> None:
    """UserError where a process has other options, or sees other data, than the first. All ranks must call it."""
    mine = {"options": _options(cfg), "data": data}
    everyone = world.gather(mine)
    for rank, other in enumerate(everyone):
        found = _differences(everyone[0]["options"], other["options"]) + _data_differences(
            everyone[0]["data"], other["data"]
        )
        if found:
            raise UserError(
                f"process {rank} differs from process 0: {_listed(found)} (process 0 -> process {rank}); give all "
                "processes the same command line and the same data"
            )


def check_resumed(
    cfg: CN, data: dict[str, dict], per_update: int, checkpoint: Checkpoint | None, allow_changes: bool
) -> None:
    """UserError where the run of `checkpoint` had other data or other options that change the result. With
    `allow_changes` they are named in the log."""
    if checkpoint is None:
        return
    meta = checkpoint.meta
    found = _differences(_options(parse_config(meta["config"])), _options(cfg))
    if meta["images_per_update"] != per_update:
        found.append(f"images per update {meta['images_per_update']} -> {per_update}")
    if meta["data"] is not None:
        found += _data_differences(meta["data"], data)
    if found and not allow_changes:
        raise UserError(
            f"{checkpoint.folder} was written with other options or data: {_listed(found)} (then -> now); use the "
            "same, or add --allow-changes to go on with these"
        )
    for each in found:
        _log.warning("changed since the checkpoint: %s", each)


def check_photographs(source: ImageSource, root: Path, checkpoint: Checkpoint) -> None:
    """Say so where the photographs to evaluate with, of the data in `root`, are not those of the run that wrote the
    checkpoint. UserError for other classes: labels are positions in their names."""
    labels, data = checkpoint.meta["classes"], checkpoint.meta["data"]
    other = sorted(set(source.classes) ^ set(labels or source.classes))
    if other:
        where = "in the data, but not of" if other[0] in source.classes else "not in the data, but of"
        raise UserError(f"class {other[0]!r} is {where} the run that wrote {checkpoint.folder}: give the same classes")
    val = fingerprint(source, root)
    if data is not None and data["val"]["image_names"] != val["image_names"]:
        _log.warning(
            "the validation images are not the %d of the run that wrote %s, but %d: it may have been trained on some",
            data["val"]["images"],
            checkpoint.folder,
            val["images"],
        )


def _options(cfg: CN) -> dict[str, Any]:
    """Those that change the result; the model's own are checked by themselves on resume."""
    return {key: value for key, value in flattened(cfg).items() if key not in _FREE}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    defaults = flattened(default_config())
    keys = sorted({*before, *now})
    values = ((key, *(of.get(key, defaults.get(key)) for of in (before, now))) for key in keys)
    return [f"{key} {one!r} -> {other!r}" for key, one, other in values if one != other]


def _data_differences(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    found = []
    for split in ("train", "val"):
        for key, words in _WORDS.items():
            one, other = before[split][key], now[split][key]
            if one != other:
                values = f" {one} -> {other}" if isinstance(other, int) else " differ"
                found.append(words.format(split={"train": "training", "val": "validation"}[split]) + values)
    return found


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    return "; ".join(found[:_MOST_SHOWN]) + more
