"""Learning rates: linear scaling with the global batch, warm-up and cosine per optimizer update."""

from dataclasses import dataclass

import torch
from timm.scheduler import CosineLRScheduler
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
    """Linear scaling: every rate of the config x (batch per process x processes x accumulation steps) / 512."""
    scale = images_per_update / _REFERENCE_BATCH
    return Rates(train_cfg.BASE_LR * scale, train_cfg.WARMUP_LR * scale, train_cfg.MIN_LR * scale)


def build_scheduler(
    optimizer: torch.optim.Optimizer, train_cfg: CN, rates: Rates, updates_per_epoch: int
) -> CosineLRScheduler:
    """The rate of the update after t updates. With W warm-up updates and T = total - W:

        t < W:      warmup + t (base - warmup) / W
        t < W + T:  minimum + (base - minimum) (1 + cos(pi (t - W) / T)) / 2
        else:       minimum

    Call `step_update(t)` after the t-th update; an update skipped by the gradient scaler does not count.
    """
    warmup = train_cfg.WARMUP_EPOCHS * updates_per_epoch
    total = train_cfg.EPOCHS * updates_per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=rates.minimum,
        warmup_t=warmup,
        warmup_lr_init=rates.warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
