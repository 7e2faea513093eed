"""Whether the data of a config is where the config says, before anything is built; and fits its classes, after."""

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

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
        for dataset in _datasets(cfg.get(f"{split}_dataloader")):
            absent = [str(path) for path in _parts(dataset) if not _is_there(path)]
            if absent:
                missing |= dict.fromkeys(absent)
                layout, root = _LAYOUTS.get(dataset.type, ""), dataset.get("data_root", "")
    if missing:
        expected = f"; {root} must hold {layout}" if layout else ""
        raise UserError(f"missing data: {', '.join(missing)}{expected}; --data-root DIR names another place")


def set_data_root(cfg: Config, root: str) -> None:
    """Read all data, and the annotations that evaluators read again, from `root`."""
    for split in ("train", "val", "test"):
        for dataset in _datasets(cfg.get(f"{split}_dataloader")):
            before, dataset.data_root = dataset.get("data_root") or "", root
            for evaluator in evaluators(cfg, split):
                if "ann_file" in evaluator and evaluator.ann_file.startswith(before):
                    evaluator.ann_file = str(Path(root) / evaluator.ann_file[len(before) :].lstrip("/"))


def evaluators(cfg: Config, split: str) -> list[ConfigDict]:
    """Those of "val" or "test": a config may have none, one or a list."""
    found = cfg.get(f"{split}_evaluator") or []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _datasets(loader: ConfigDict | None) -> list[ConfigDict]:
    """The plain data sets in a loader, without wrappers such as RepeatDataset and ConcatDataset."""
    found, open_ = [], [loader.dataset] if loader else []
    while open_:
        dataset = open_.pop()
        inner = dataset.get("dataset", dataset.get("datasets"))
        if inner is None:
            found.append(dataset)
        else:
            open_ += inner if isinstance(inner, (list, tuple)) else [inner]
    return found


def _parts(dataset: ConfigDict) -> list[Path]:
    root = Path(dataset.get("data_root") or "")
    names = [dataset.get("ann_file"), *dataset.get("data_prefix", {}).values()]
    return [root / name for name in names if name]


def _is_there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


class FitsModel(Hook):
    """Stops with a UserError where classes of the data, of its annotations and of the model's heads differ: the
    frameworks would train on no boxes at all, or fail far from the cause."""

    def before_train(self, runner: Runner) -> None:
        self._check(runner, runner.train_loop.dataloader.dataset)
        if runner.val_loop is not None:
            # now, and not when the first epoch is over
            self._check(runner, runner.val_loop.dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        self._check(runner, runner.test_loop.dataloader.dataset)

    def _check(self, runner: Runner, dataset: BaseDataset) -> None:
        while hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        classes = dataset.metainfo["classes"]
        if len(dataset) == 0:
            raise UserError(
                f"the data set in {dataset.data_root} is empty: no image has an annotation of the classes {classes[:5]}"
                f"{'...' if len(classes) > 5 else ''}"
            )
        check_category_names(dataset, classes)
        if dataset.test_mode:
            check_masks(dataset)
        check_heads(runner.model, len(classes))


def check_category_names(dataset: BaseDataset, classes: Sequence[str]) -> None:
    """COCO annotations must know every class by its name; UserError names those that they do not."""
    if not hasattr(dataset, "cat_ids") or len(dataset.cat_ids) == len(classes):
        return
    known = [dataset.cat2label[number] for number in dataset.cat_ids]
    raise UserError(
        f"{dataset.ann_file} has {len(known)} of the {len(classes)} classes of the config "
        f"({', '.join(classes[:5])}...): change metainfo.classes of the data sets"
    )


def check_masks(dataset: BaseDataset) -> None:
    """Annotations of an evaluation need masks, if any has one: pycocotools fails on empty ones far from the cause.
    UserError names the first."""
    if not hasattr(dataset, "cat_ids"):
        return
    instances = [
        (data, instance) for data in map(dataset.get_data_info, range(len(dataset))) for instance in data["instances"]
    ]
    empty = [data["img_path"] for data, instance in instances if not instance.get("mask")]
    if empty and len(empty) < len(instances):
        raise UserError(
            f"{dataset.ann_file} has {len(empty)} annotations with an empty segmentation, the first of {empty[0]}: "
            "take them out, as they cannot be evaluated"
        )


def check_heads(model: nn.Module, classes: int) -> None:
    """Every head must have as many classes as the data; UserError names the first that has not."""
    for name, module in model.named_modules():
        name = name.removeprefix("module.")
        wanted = getattr(module, "num_classes", None)
        # a backbone's own number is that of its classifier, the RPN knows objects only, and "" is the whole model
        if not name or name.startswith("backbone") or name.endswith("rpn_head") or wanted in (None, classes):
            continue
        raise UserError(
            f"{name}.num_classes is {wanted}, but the data has {classes} classes: "
            f"--cfg-options model.{name}.num_classes={classes}"
        )
