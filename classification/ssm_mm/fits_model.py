"""Whether the data of a training or test fits the classes of its model, when both are built."""

from collections.abc import Sequence

from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from ssm_train.common.errors import UserError


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

    def _check(self, runner: Runner, dataset: Dataset) -> None:
        for plain in plain_datasets(dataset):
            classes = plain.metainfo["classes"]
            if len(plain) == 0:
                raise UserError(
                    f"the data set in {plain.data_root} is empty: no image has an annotation of the classes "
                    f"{classes[:5]}{'...' if len(classes) > 5 else ''}"
                )
            check_category_names(plain, classes)
            if plain.test_mode:
                check_masks(plain)
            check_heads(runner.model, len(classes))


def plain_datasets(dataset: Dataset) -> list[BaseDataset]:
    """The data sets that read files: without RepeatDataset, ConcatDataset and other wrappers, of any depth."""
    if hasattr(dataset, "datasets"):
        return [plain for inner in dataset.datasets for plain in plain_datasets(inner)]
    return plain_datasets(dataset.dataset) if hasattr(dataset, "dataset") else [dataset]


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
