"""How fast a model is in this trainer's own steps: images/s of one process on synthetic images."""

import math
import statistics
from collections.abc import Callable

import torch
from torch import nn
from yacs.config import CfgNode as CN

from ssm_train.common.distributed import World
from ssm_train.common.precision import autocast
from ssm_train.common.timing import timed
from ssm_train.config.defaults import channels
from ssm_train.step.engine import Training, take_update, training_loss
from ssm_train.step.model import set_train_mode


def inference_speed(model: nn.Module, cfg: CN, amp: str, world: World) -> float:
    """Images/s of forward passes."""
    model.eval()
    images = _images(cfg, world.device)

    def step() -> None:
        with torch.inference_mode(), autocast(amp, world.device):
            model(images)

    return len(images) / _median_seconds(step, world)


def training_speed(run: Training, cfg: CN, world: World) -> float:
    """Images/s of whole updates: mixing, forward, backward, optimizer, average."""
    set_train_mode(run.parallel)
    images = _images(cfg, world.device)
    targets = torch.arange(len(images), device=world.device) % cfg.MODEL.NUM_CLASSES

    def step() -> None:
        loss = training_loss(run, images, targets, mesa=cfg.TRAIN.MESA > 0)
        run.scaler.scale(loss).backward()
        take_update(run, world, losses=[loss.detach()], stop=False)

    return len(images) / _median_seconds(step, world)


def _images(cfg: CN, device: torch.device) -> torch.Tensor:
    images = torch.randn(cfg.DATA.BATCH_SIZE, channels(cfg), cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE, device=device)
    return images.to(memory_format=torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format)


def _median_seconds(step: Callable[[], None], world: World, *, repeats: int = 5, seconds: float = 0.5) -> float:
    """Seconds of one step: median of `repeats` timings of about `seconds` each. All ranks make as many steps."""

    timed(step, world.device, 2)  # compiles kernels and fills caches
    [total] = world.sum([timed(step, world.device)])
    count = max(1, math.ceil(seconds * world.size / total))
    return statistics.median(timed(step, world.device, count) / count for _ in range(repeats))
