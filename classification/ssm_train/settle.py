"""What the config leaves open (config.defaults.OPEN), settled by the data and the machine, each in one line of the log.

classes   as many as the training data have; with --eval, as the checkpoint or the validation data have; of a network
          alone (--throughput, --traincost), its own number.
workers   the cores this process may use, divided by the processes of its machine, 8 at most. No result depends on it.
batch     RECIPE_BATCH images per process and update, halved down to 8 while an epoch would have less than 8 updates,
          in micro-steps of the largest power of two for which what the backward pass keeps of the images takes at most
          half of the memory (of the GPU; else of the machine, divided by its processes); on a CPU of 16 at most: a step
          that takes long says nothing and cannot be stopped. So the update, and with it the learning rate, is that of
          the published recipes on small machines, too.
epochs    as many as TRAIN.UPDATES optimizer updates take, 5 at least and 100 at most; a tenth of them is warm-up.

What was settled stands in config.yaml and in every checkpoint. A run that is resumed takes all of it from there, but
counts its workers anew.
"""

import logging
from collections.abc import Collection
from pathlib import Path

import timm
from yacs.config import CfgNode as CN

from ssm_models.weights import is_path
from ssm_train.common.distributed import World, local_processes
from ssm_train.common.machine import memory_bytes, usable_cores
from ssm_train.common.precision import resolve_amp
from ssm_train.config.defaults import lookup, replaced
from ssm_train.config.load import parse_config
from ssm_train.record.checkpoint import META, Checkpoint, best_or_itself, read_checkpoint
from ssm_train.step.memory import kept_bytes
from ssm_train.step.model import check_model_name
from ssm_train.step.pretrained import published

_log = logging.getLogger(__name__)

RECIPE_BATCH = 128
_SMALLEST_BATCH = 2  # mixup makes pairs
_LEAST_UPDATES, _SMALL_BATCH = 8, 8  # of an epoch; the batch below which nothing is halved for their sake
_CPU_BATCH = 16  # images per micro-step
_MOST_WORKERS = 8
_EPOCHS = (5, 100)
_MEMORY_SHARE = 0.5
_PUBLISHED = ("DATA.IMG_SIZE", "DATA.INTERPOLATION", "DATA.CROP_RATIO")
_EVALUATION = (*_PUBLISHED, "DATA.VAL_SHARE", "SEED")  # the latter: which photographs were set apart


def asked_batch(cfg: CN) -> list[int | None]:
    """What the user says of the batch; a checkpoint keeps it beside what became of it."""
    return [cfg.DATA.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS]


def as_before(cfg: CN, checkpoint: Checkpoint | None) -> CN:
    """The config with what the run of `checkpoint` settled. Who says something else of the batch gets that."""
    if checkpoint is None:
        return cfg
    saved, values = parse_config(checkpoint.meta["config"]), {}
    if cfg.MODEL.NUM_CLASSES is None:
        values["MODEL.NUM_CLASSES"] = saved.MODEL.NUM_CLASSES
    if cfg.DATA.BATCH_SIZE is None and checkpoint.meta["asked_batch"] == asked_batch(cfg):
        values["DATA.BATCH_SIZE"] = saved.DATA.BATCH_SIZE
        values["TRAIN.ACCUMULATION_STEPS"] = saved.TRAIN.ACCUMULATION_STEPS
    for key in ("TRAIN.EPOCHS", "TRAIN.WARMUP_EPOCHS"):
        if lookup(cfg, key) is None:
            values[key] = lookup(saved, key)
    return replaced(cfg, values)


def as_trained(cfg: CN, weights: Checkpoint | Path, told: Collection[str]) -> CN:
    """The config with the evaluation that `weights` were trained for: images of the size, crop and interpolation of
    their run, and of photographs those that it had set apart; or what their authors published results with. For others
    the config says it, as do the keys `told` on the command line. What that changes stands in the log."""
    if isinstance(weights, Path) and not is_path(weights):
        settings = timm.get_pretrained_cfg(published(weights).model)
        values = dict(zip(_PUBLISHED, (settings.input_size[1], settings.interpolation, settings.crop_pct), strict=True))
        whose = f"published for {weights}"
    else:
        if isinstance(weights, Path):
            folder = best_or_itself(weights)
            if not (folder / META).is_file():
                return cfg
            weights = read_checkpoint(folder)
        saved = parse_config(weights.meta["config"])
        values = {key: lookup(saved, key) for key in _EVALUATION}
        whose = f"of the run that wrote {weights.folder}"
    changed = {key: value for key, value in values.items() if key not in told and value != lookup(cfg, key)}
    for key, value in changed.items():
        instead = lookup(cfg, key)
        _log.info("%s is %s, as %s, in place of the config's %s (--opts changes it)", key, value, whose, instead)
    return replaced(cfg, changed)


def with_classes(cfg: CN, count: int) -> CN:
    """The config with the classes of the data, if it has none."""
    if cfg.MODEL.NUM_CLASSES is not None:
        return cfg
    _log.info("MODEL.NUM_CLASSES is not given: %d, as many as the data have", count)
    return replaced(cfg, {"MODEL.NUM_CLASSES": count})


def with_own_classes(cfg: CN) -> CN:
    """The config with the classes that the network has by itself, if it has none. UserError for an unknown network."""
    if cfg.MODEL.NUM_CLASSES is not None:
        return cfg
    check_model_name(cfg.MODEL.NAME, "MODEL.NAME")
    return replaced(cfg, {"MODEL.NUM_CLASSES": timm.get_pretrained_cfg(cfg.MODEL.NAME).num_classes})


def with_machine(cfg: CN, world: World, images: int | None = None) -> CN:
    """The config with workers and batch, if it has none; `images` are those of the training set. All ranks must call
    it. Raises UserError for a network that cannot be built."""
    values = {}
    if cfg.DATA.NUM_WORKERS is None:
        values["DATA.NUM_WORKERS"] = workers = min(_MOST_WORKERS, usable_cores() // local_processes())
        _log.info(
            "DATA.NUM_WORKERS is not given: %d, for %d core(s) and %d process(es) here",
            workers,
            usable_cores(),
            local_processes(),
        )
    if cfg.DATA.BATCH_SIZE is None:
        kept = world.on_main(lambda: kept_bytes(cfg, resolve_amp(cfg.AMP, world.device)))
        memory = min(world.gather(memory_bytes(world.device)))
        accumulation = cfg.TRAIN.ACCUMULATION_STEPS
        update = batch = recipe_batch(world.size * accumulation, images)
        if world.device.type == "cpu":
            batch = min(batch, _CPU_BATCH)
        while batch > _SMALLEST_BATCH and batch * kept > _MEMORY_SHARE * memory:
            batch //= 2
        values["DATA.BATCH_SIZE"], values["TRAIN.ACCUMULATION_STEPS"] = batch, accumulation * update // batch
        _log.info(
            "DATA.BATCH_SIZE is not given: %d images x %d micro-step(s) per process and update, for %.0f MB an image "
            "and %.1f GB of memory",
            batch,
            accumulation * update // batch,
            kept / 2**20,
            memory / 2**30,
        )
    return replaced(cfg, values)


def recipe_batch(parts: int, images: int | None) -> int:
    """RECIPE_BATCH, halved while `images` are less than _LEAST_UPDATES updates of `parts` such batches, and below
    _SMALL_BATCH only where they are less than one."""
    batch = RECIPE_BATCH
    while images is not None and batch > _SMALL_BATCH and batch * parts * _LEAST_UPDATES > images:
        batch //= 2
    while images is not None and batch > _SMALLEST_BATCH and batch * parts > images:
        batch //= 2
    return batch


def with_epochs(cfg: CN, updates_per_epoch: int) -> CN:
    """The config with epochs and warm-up, if it has none."""
    values: dict[str, int] = {}
    epochs, warmup = cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS
    if epochs is None:
        least, most = _EPOCHS
        values["TRAIN.EPOCHS"] = epochs = min(max(least, round(cfg.TRAIN.UPDATES / updates_per_epoch)), most)
        _log.info(
            "TRAIN.EPOCHS is not given: %d, for %d updates (TRAIN.UPDATES) of which an epoch has %d, between %d and %d",
            epochs,
            cfg.TRAIN.UPDATES,
            updates_per_epoch,
            least,
            most,
        )
    if warmup is None:
        # a run of one epoch has no room for it
        values["TRAIN.WARMUP_EPOCHS"] = min(-(-epochs // 10), epochs - 1)
    return replaced(cfg, values)
