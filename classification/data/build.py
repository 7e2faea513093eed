"""Data loaders for a config: root/{train,val}/<class>/** with checks that name what is wrong."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from yacs.config import CfgNode as CN

from classification.data.dataset import EvalImages, Sample, TrainImages, collate
from classification.data.samplers import EvalBatches, TrainBatches
from classification.data.transforms import eval_transform, train_transform
from classification.distributed import World
from classification.errors import UserError

_EXPECTED = "it must hold train/<class>/*.png|jpg|... and val/<class>/*.png|jpg|..."


def scan_split(cfg: CN, split: str) -> ImageFolder:
    """List DATA_PATH/`split` and compare its classes with the config.

    Raises UserError for a missing folder, no class folders, class folders without images and another number of classes.
    """
    if not cfg.DATA.DATA_PATH:
        raise UserError(f"no data set given: add --data-path FOLDER; {_EXPECTED}")
    root = Path(cfg.DATA.DATA_PATH)
    if not root.is_dir():
        raise UserError(f"--data-path {root} is not a folder; {_EXPECTED}")
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"--data-path {root} has no folder {split!r}; {_EXPECTED}")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise UserError(f"{folder} holds no class folders; --data-path {root}: {_EXPECTED}")
    try:
        found = ImageFolder(str(folder), allow_empty=True)
    except OSError as error:
        raise UserError(f"cannot list {error.filename or folder}: {error.strerror}") from error
    filled = {target for _, target in found.samples}
    empty = [name for name, target in found.class_to_idx.items() if target not in filled]
    if empty:
        more = f" (nor do {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {folder / empty[0]} holds no images{more}; put images ({', '.join(found.extensions)}) "
            "into it or remove it from train and val"
        )
    if len(found.classes) != cfg.MODEL.NUM_CLASSES:
        raise UserError(
            f"{folder} holds {len(found.classes)} class folders, but MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}: "
            f"use --opts MODEL.NUM_CLASSES {len(found.classes)} or another --data-path"
        )
    return found


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Labels are positions in the sorted class names, so both splits must have the same. Raises UserError."""
    only = sorted(set(train.classes) ^ set(val.classes))
    if only:
        here, there = (train, val) if only[0] in train.classes else (val, train)
        raise UserError(
            f"class folder {only[0]!r} is in {here.root} but not in {there.root}: both need the same classes"
        )


def train_loader(cfg: CN, found: ImageFolder, world: World) -> DataLoader:
    """Batches of this rank (`Batch`); `loader.batch_sampler` is the TrainBatches whose epoch must be set."""
    sampler = TrainBatches(
        len(found.samples),
        cfg.DATA.BATCH_SIZE,
        rank=world.rank,
        world_size=world.size,
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
        seed=cfg.SEED,
    )
    dataset = TrainImages(found.samples, train_transform(cfg), seed=cfg.SEED, max_bad=cfg.DATA.MAX_BAD_IMAGES)
    return _loader(cfg, dataset, sampler, world)


def eval_loader(cfg: CN, found: ImageFolder, world: World) -> DataLoader:
    """Batches of this rank's share of the validation images, each image once over all ranks."""
    sampler = EvalBatches(len(found.samples), cfg.DATA.BATCH_SIZE, rank=world.rank, world_size=world.size)
    return _loader(cfg, EvalImages(found.samples, eval_transform(cfg)), sampler, world)


def _loader(cfg: CN, dataset: Dataset[Sample], sampler: TrainBatches | EvalBatches, world: World) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=cfg.DATA.NUM_WORKERS,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        persistent_workers=cfg.DATA.NUM_WORKERS > 0,
        # the loader draws a seed for its workers, which ours do not use; a generator of its own spares the global one
        generator=torch.Generator(),
    )
