"""Data loaders for a config, with checks that name what is wrong."""

import atexit
import functools
import weakref
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode as CN

from ssm_train.common.decode import Decoder
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.preemption import leave_signals_to_trainer
from ssm_train.config.defaults import channels
from ssm_train.data.dataset import EvalImages, Sample, TrainImages, collate
from ssm_train.data.samplers import EvalBatches, TrainBatches
from ssm_train.data.sources import FORMATS, ImageSource, PhotoSource, cached
from ssm_train.data.transforms import eval_transform, train_transform

_PREFETCH = 4  # batches per worker that wait for the training: one slow archive read does not stop it


def scan_split(cfg: CN, split: str) -> ImageSource:
    """Index the "train" or "val" images of DATA_PATH, in the format DATASET, and compare the classes with the config;
    where it has no number of them, there are as many as the data have.

    Raises UserError for data that is missing, malformed, dangerous, or has another number of classes.
    """
    if cfg.DATA.DATASET not in FORMATS:
        raise UserError(
            f"config DATA.DATASET is {cfg.DATA.DATASET!r}, but it must be one of {', '.join(map(repr, FORMATS))}"
        )
    source = FORMATS[cfg.DATA.DATASET]
    if not cfg.DATA.DATA_PATH:
        raise UserError(f"no data set given: add --data-path FOLDER; {source.LAYOUT}")
    root = Path(cfg.DATA.DATA_PATH)
    if not root.is_dir():
        raise UserError(f"--data-path {root} is not a folder; {source.LAYOUT}")
    read = decoder(cfg)
    rule = {"share": cfg.DATA.VAL_SHARE, "seed": cfg.SEED, "decoder": read} if source is PhotoSource else {}
    found = source(root, split, cfg.MODEL.NUM_CLASSES, **rule)
    found.decoder = read
    return found


def decoder(cfg: CN) -> Decoder:
    """How the config wants images to be read. Photographs are turned upright; data sets in the layouts that are
    published keep the pixels as they are stored, which is what published accuracies were measured with."""
    return Decoder(channels(cfg), tuple(cfg.DATA.RANGE) or None, upright=cfg.DATA.DATASET == "photos")


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Labels are positions in the class names, so both splits must have the same. Raises UserError."""
    only = sorted(set(train.classes) ^ set(val.classes))
    if only:
        here, there = (train, val) if only[0] in train.classes else (val, train)
        raise UserError(
            f"{here.CLASS} {only[0]!r} is in {here.root} but not in {there.root}: both need the same classes"
        )
    if train.classes != val.classes:
        raise UserError(f"{train.root} and {val.root} have the same classes in another order: labels would differ")


def train_loader(cfg: CN, found: ImageSource, world: World) -> DataLoader:
    """Batches of this rank (`Batch`); `loader.batch_sampler` is the TrainBatches whose position must be set."""
    sampler = TrainBatches(
        len(found),
        cfg.DATA.BATCH_SIZE,
        rank=world.rank,
        world_size=world.size,
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
        seed=cfg.SEED,
        repeats=cfg.DATA.REPEATS,
    )
    # a GPU has time to spare for the last steps, and a quarter of the bytes to wait for
    transform = train_transform(cfg, raw=world.device.type == "cuda")
    source = cached(found, cfg.DATA.CACHE_MODE, world)
    dataset = TrainImages(source, transform, seed=cfg.SEED, max_bad_share=cfg.DATA.MAX_BAD_SHARE)
    return _loader(cfg, dataset, sampler, world)


def eval_loader(cfg: CN, found: ImageSource, world: World) -> DataLoader:
    """Batches of this rank's share of the validation images, each image once over all ranks."""
    sampler = EvalBatches(len(found), cfg.DATA.BATCH_SIZE, rank=world.rank, world_size=world.size)
    # a rank reads the same images every time, so they are all that "full" can mean
    source = cached(found, "part" if cfg.DATA.CACHE_MODE == "full" else cfg.DATA.CACHE_MODE, world)
    return _loader(cfg, EvalImages(source, eval_transform(cfg)), sampler, world)


def close_workers(*loaders: DataLoader) -> None:
    """End the workers of these loaders, which live as long as their loader; when that is, nobody knows: the garbage
    collector need not come by before the process ends, and then it would wait for them."""
    for loader in loaders:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


_LOADERS: weakref.WeakSet[DataLoader] = weakref.WeakSet()


def closed_at_exit(loader: DataLoader) -> DataLoader:
    """The loader. Where somebody holds it to the end, as a traceback does, its workers end before Python does: that
    would send them SIGTERM, which they hold back for a minute (`leave_signals_to_trainer`), and wait."""
    _close_at_exit()
    _LOADERS.add(loader)
    return loader


@functools.cache
def _close_at_exit() -> None:
    atexit.register(lambda: close_workers(*_LOADERS))


def _loader(cfg: CN, dataset: Dataset[Sample], sampler: TrainBatches | EvalBatches, world: World) -> DataLoader:
    workers = cfg.DATA.NUM_WORKERS
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_trainer,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=_PREFETCH if workers else None,
        # the loader draws a seed for its workers, which ours do not use; a generator of its own spares the global one
        generator=torch.Generator(),
    )
    return closed_at_exit(loader)
