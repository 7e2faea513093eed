"""Whether the data of a config is where the config says, before anything is built."""

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from ssm_mm.config_parts import evaluators, plain_datasets, type_name
from ssm_train.common.errors import UserError

_LAYOUTS = {
    "CocoDataset": (
        "annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/*.jpg and val2017/*.jpg "
        "(https://cocodataset.org, the 2017 train, val and annotation archives)"
    ),
    "ADE20KDataset": (
        "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png "
        "(ADEChallengeData2016.zip of https://sceneparsing.csail.mit.edu)"
    ),
}


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """UserError that names every missing file and folder of the loaders of `splits` ("train", "val", "test")."""
    missing: dict[str, None] = {}
    layout = root = ""
    for split in splits:
        for dataset in plain_datasets(cfg.get(f"{split}_dataloader")):
            absent = [str(path) for path in _parts(dataset) if not _is_there(path)]
            if absent:
                missing |= dict.fromkeys(absent)
                layout, root = _LAYOUTS.get(type_name(dataset), ""), dataset.get("data_root", "")
    if missing:
        expected = f"; {root} must hold {layout}" if layout else ""
        raise UserError(f"missing data: {', '.join(missing)}{expected}; --data-root DIR names another place")


def set_data_root(cfg: Config, root: str) -> None:
    """Read all data, and the annotations that evaluators read again, from `root`."""
    for split in ("train", "val", "test"):
        datasets = plain_datasets(cfg.get(f"{split}_dataloader"))
        # one may lie inside another: the longest that fits
        before = sorted({dataset.get("data_root") or "" for dataset in datasets}, key=len, reverse=True)
        for dataset in datasets:
            dataset.data_root = root
        for evaluator in evaluators(cfg, split):
            annotations = evaluator.get("ann_file") or ""
            # without a root of their own, absolute paths are not below it
            own = next((name for name in before if annotations.startswith(name)), None)
            if annotations and own is not None and (own or not Path(annotations).is_absolute()):
                evaluator.ann_file = str(Path(root) / annotations[len(own) :].lstrip("/"))


def _parts(dataset: ConfigDict) -> list[Path]:
    root = Path(dataset.get("data_root") or "")
    names = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    return [root / name for name in names if name]


def _is_there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))
