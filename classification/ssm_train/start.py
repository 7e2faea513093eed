"""Where a run starts: everything an update needs, built from the config or restored from a checkpoint."""

import logging
from typing import NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode as CN

from ssm_models.weights import is_path
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.precision import resolve_amp
from ssm_train.common.seeding import seed_init
from ssm_train.config.defaults import replaced
from ssm_train.data.on_device import OnDevice
from ssm_train.data.transforms import build_mixup
from ssm_train.record.checkpoint import Checkpoint, Position
from ssm_train.step.ema import Average
from ssm_train.step.engine import Training
from ssm_train.step.losses import build_criterion
from ssm_train.step.model import build_model, count_parameters, freeze
from ssm_train.step.optimizer import build_optimizer, decay_counts
from ssm_train.step.parallel import shard, wrap
from ssm_train.step.pretrained import Loaded, Pretrained, start_from
from ssm_train.step.schedule import build_schedule, resolve_rates
from ssm_train.step.state import restore_progress, restore_weights

_log = logging.getLogger(__name__)


class Beginning(NamedTuple):
    """What a run begins with: a checkpoint, or given weights, or none."""

    checkpoint: Checkpoint | None
    pretrained: Pretrained | None
    fresh: bool
    """What the run folder holds is set aside."""
    allow_changes: bool
    """Data and options may be others than those of `checkpoint`."""
    command: str
    """The command line, for the records."""


def images_per_update(cfg: CN, world: World) -> int:
    """The global batch."""
    return cfg.DATA.BATCH_SIZE * world.size * cfg.TRAIN.ACCUMULATION_STEPS


def same_updates(cfg: CN, checkpoint: Checkpoint | None, world: World, asked: list[int | None]) -> CN:
    """The config under which another number of processes than began the run makes the same updates: same global batch,
    same schedule, same order of images. Who asks for another batch (`asked_batch`) on as many processes gets it.

    Raises UserError where the global batch cannot be divided.
    """
    if checkpoint is None:
        return cfg
    if checkpoint.meta["processes"] == world.size and checkpoint.meta["asked_batch"] != asked:
        return cfg
    wanted = checkpoint.meta["images_per_update"]
    if wanted == images_per_update(cfg, world):
        return cfg
    share, rest = divmod(wanted, world.size)
    if rest:
        raise UserError(
            f"{checkpoint.folder} was written with {wanted} images per update, which {world.size} processes cannot "
            "share: use a number that divides it"
        )
    # the largest batch that fits where the configured one did; pairs for mixup stay pairs
    step = 2 if cfg.DATA.BATCH_SIZE % 2 == 0 and share % 2 == 0 else 1
    batch = max(size for size in range(step, min(share, cfg.DATA.BATCH_SIZE) + 1, step) if share % size == 0)
    cfg = replaced(cfg, {"DATA.BATCH_SIZE": batch, "TRAIN.ACCUMULATION_STEPS": share // batch})
    _log.info(
        "%d process(es): batch %d x %d accumulation step(s) keep the run's %d images per update",
        world.size,
        batch,
        share // batch,
        wanted,
    )
    return cfg


def prepare(
    cfg: CN,
    world: World,
    updates_per_epoch: int,
    checkpoint: Checkpoint | None = None,
    pretrained: Pretrained | None = None,
) -> Training:
    """Model, average, loss, optimizer and schedule. Raises UserError for weights of another model."""
    run = world.together(lambda: _build(cfg, world, updates_per_epoch, checkpoint, pretrained))
    if world.size > 1 and cfg.PARALLEL == "fsdp":
        shard(run.network, world)
        if run.ema is not None:
            shard(run.ema.module, world)
        # its parameters are other tensors now
        run.optimizer = build_optimizer(run.network, cfg.TRAIN, run.optimizer.defaults["lr"])
        run.schedule = _schedule(run.optimizer, cfg, world, updates_per_epoch)
    if checkpoint is not None:
        world.together(lambda: restore_progress(run, checkpoint, images_per_update(cfg, world)))
    # with the weights in place, and with all ranks alive: DDP sends those of rank 0 to all
    run.parallel = wrap(run.network, cfg, world)
    return run


def _build(
    cfg: CN,
    world: World,
    updates_per_epoch: int,
    checkpoint: Checkpoint | None,
    pretrained: Pretrained | None,
) -> Training:
    seed_init(cfg.SEED)
    network = build_model(cfg)
    loaded: Loaded | None = None
    if checkpoint is None and pretrained is not None:
        loaded = _started(network, cfg, pretrained)
        _log.info("weights from %s", loaded)
    freeze(network, cfg)
    memory_format = torch.channels_last if cfg.CHANNELS_LAST else torch.preserve_format
    network.to(world.device, memory_format=memory_format)
    ema = Average(network, cfg.TRAIN.EMA_DECAY) if cfg.TRAIN.EMA_DECAY else None
    rates = resolve_rates(cfg.TRAIN, images_per_update(cfg, world))
    optimizer = build_optimizer(network, cfg.TRAIN, rates.base)
    amp = resolve_amp(cfg.AMP, world.device)
    run = Training(
        network=network,
        parallel=network,
        ema=ema,
        optimizer=optimizer,
        schedule=_schedule(optimizer, cfg, world, updates_per_epoch),
        scaler=torch.amp.GradScaler(world.device.type, enabled=amp == "fp16"),
        mixup=build_mixup(cfg),
        criterion=build_criterion(cfg, world.device),
        amp=amp,
        clip_grad=cfg.TRAIN.CLIP_GRAD,
        on_device=OnDevice(cfg, world.device),
        loaded=loaded,
    )
    if checkpoint is not None:
        restore_weights(run, checkpoint)
    _log.info(
        "%s: %.3f M parameters, %d tensors with weight decay, %d without; %s, amp %s, %d process(es)",
        cfg.MODEL.NAME,
        count_parameters(network) / 1e6,
        *decay_counts(optimizer),
        world.device,
        amp,
        world.size,
    )
    _log.info(
        "learning rate %.4g (warm-up from %.4g, down to %.4g) for %d images per update, %d updates per epoch",
        rates.base,
        rates.warmup,
        rates.minimum,
        images_per_update(cfg, world),
        updates_per_epoch,
    )
    return run


def _started(network: nn.Module, cfg: CN, pretrained: Pretrained) -> Loaded:
    """`start_from`; where a published name cannot be had, the message says how to go on without."""
    try:
        return start_from(network, cfg, pretrained)
    except UserError as error:
        if is_path(pretrained.path):
            raise
        raise UserError(f"{error}; or begin with --pretrained FILE, or with random weights: --from-scratch") from error


def _schedule(optimizer: torch.optim.Optimizer, cfg: CN, world: World, updates_per_epoch: int):
    rates = resolve_rates(cfg.TRAIN, images_per_update(cfg, world))
    return build_schedule(optimizer, cfg.TRAIN, rates, updates_per_epoch)


def weights_record(run: Training, checkpoint: Checkpoint | None) -> dict | None:
    """The record of the weights that the run began with, in this process or in that of `checkpoint`."""
    if checkpoint is not None:
        return checkpoint.meta["pretrained"]
    return None if run.loaded is None else run.loaded.record()


def place(checkpoint: Checkpoint | None, updates_per_epoch: int, per_update: int) -> Position:
    """Where the run of `checkpoint` continues. Raises UserError where it stopped inside an epoch that is divided into
    updates differently now."""
    if checkpoint is None:
        return Position(0)
    position, before = checkpoint.position, checkpoint.meta["images_per_update"]
    if before == per_update or position.update == 0:
        return position
    slots, rest = divmod(position.update * before, per_update)
    if rest or slots > updates_per_epoch:
        raise UserError(
            f"{checkpoint.folder} lies {position.update} updates of {before} images into an epoch, which is no whole "
            f"number of updates of {per_update}: resume with the former batch size"
        )
    return Position(position.epoch, slots)
