"""Learning rates: linear scaling with the global batch, warm-up, and a decay per update or per epoch."""

from dataclasses import dataclass

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from yacs.config import CfgNode as CN

# the published rates are given for this many images per optimizer update
_REFERENCE_BATCH = 512


@dataclass(frozen=True)
class Rates:
    """Resolved learning rates."""

    base: float
    warmup: float
    minimum: float


def resolve_rates(train_cfg: CN, images_per_update: int) -> Rates:
    """Linear scaling: rates of the config x (batch per process x processes x accumulation steps) / 512.

    TRAIN.LR_SCALING says which: all three (the trainers of VMamba and VSSD), the base rate alone (Vim's), or none: then
    they are the rates themselves.
    """
    scale = 1.0 if train_cfg.LR_SCALING == "none" else images_per_update / _REFERENCE_BATCH
    rest = scale if train_cfg.LR_SCALING == "all" else 1.0
    return Rates(train_cfg.BASE_LR * scale, train_cfg.WARMUP_LR * rest, train_cfg.MIN_LR * rest)


class Schedule:
    """The learning rate as a function of the number of updates made; `set` puts it into the optimizer."""

    def __init__(self, scheduler: Scheduler, updates_per_step: int) -> None:
        self._scheduler = scheduler
        self._updates_per_step = updates_per_step
        self.set(0)

    def set(self, updates: int) -> None:
        """The rate of the update that follows `updates` of them. An update that was skipped does not count."""
        self._scheduler.step_update(updates // self._updates_per_step)


def build_schedule(optimizer: torch.optim.Optimizer, train_cfg: CN, rates: Rates, updates_per_epoch: int) -> Schedule:
    """The rate at time t, which counts updates, or complete epochs with SCHEDULER.PER epoch. With W the end of warm-up,
    E that of training, and s = t - W, T = E - W with WARMUP_PREFIX, s = t, T = E without:

        t < W       warmup + t (base - warmup) / W
        cosine      minimum + (base - minimum) (1 + cos(pi s / T)) / 2
        linear      minimum + (base - minimum) (1 - s / T)
        step        base DECAY_RATE^floor(t / DECAY_EPOCHS)
        multistep   base DECAY_RATE^(number of MULTISTEPS <= t)
        t >= E      cosine, linear: minimum

    Factors of layers (TRAIN.LAYER_DECAY) multiply the result.
    """
    schedule = train_cfg.SCHEDULER
    per_epoch = schedule.PER == "epoch"
    unit = 1 if per_epoch else updates_per_epoch  # of t, in an epoch
    warmup, total, rate = train_cfg.WARMUP_EPOCHS * unit, train_cfg.EPOCHS * unit, schedule.DECAY_RATE
    # t_in_epochs is timm's way to say which of its two methods sets the rate: here `step_update`
    common = {"warmup_t": warmup, "warmup_lr_init": rates.warmup, "t_in_epochs": False}
    prefix = schedule.WARMUP_PREFIX
    falling = {"t_initial": total - warmup if prefix else total, "lr_min": rates.minimum, "warmup_prefix": prefix}
    if schedule.NAME == "cosine":
        scheduler = CosineLRScheduler(optimizer, **falling, **common)
    elif schedule.NAME == "linear":
        scheduler = PolyLRScheduler(optimizer, power=1.0, **falling, **common)
    elif schedule.NAME == "step":
        decay_t = schedule.DECAY_EPOCHS * unit
        scheduler = StepLRScheduler(optimizer, decay_t=decay_t, decay_rate=rate, warmup_prefix=False, **common)
    else:
        # timm counts a step as reached one unit before it
        decay_t = [epoch * unit + 1 for epoch in schedule.MULTISTEPS]
        scheduler = MultiStepLRScheduler(optimizer, decay_t=decay_t, decay_rate=rate, warmup_prefix=False, **common)
    return Schedule(scheduler, updates_per_epoch if per_epoch else 1)
