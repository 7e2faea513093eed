"""How fast a model is in this trainer's own steps: images/s of one process on synthetic images."""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from yacs.config import CfgNode as CN

from classification.distributed import World
from classification.engine import Training, take_update, training_loss
from classification.precision import autocast


def inference_speed(model: nn.Module, cfg: CN, amp: str, device: torch.device) -> float:
    """Images/s of forward passes."""
    model.eval()
    images = _images(cfg, device)

    def step() -> None:
        with torch.inference_mode(), autocast(amp, device):
            model(images)

    return len(images) / _median_seconds(step, device)


def training_speed(run: Training, cfg: CN, world: World) -> float:
    """Images/s of whole updates: mixing, forward, backward, optimizer, average."""
    run.parallel.train()
    images = _images(cfg, world.device)
    targets = torch.arange(len(images), device=world.device) % cfg.MODEL.NUM_CLASSES

    def step() -> None:
        run.scaler.scale(training_loss(run, images, targets, mesa=cfg.TRAIN.MESA > 0)).backward()
        take_update(run, world, finite=True, stop=False)

    return len(images) / _median_seconds(step, world.device)


def _images(cfg: CN, device: torch.device) -> torch.Tensor:
    images = torch.randn(cfg.DATA.BATCH_SIZE, 3, cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE, device=device)
    return images.to(memory_format=torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format)


def _median_seconds(step: Callable[[], None], device: torch.device, *, repeats: int = 5, seconds: float = 0.5) -> float:
    """Seconds of one step: median of `repeats` timings of about `seconds` each."""

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed(2)  # compiles kernels and fills caches
    count = max(1, math.ceil(seconds / timed(1)))
    return statistics.median(timed(count) / count for _ in range(repeats))
