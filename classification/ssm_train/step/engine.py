"""One optimizer update: mix, forward, loss, backward, and whether the result may be taken.

Legend: B images per process and micro-step, C channels, S image size, K classes. An update takes ACCUMULATION_STEPS
micro-steps on every process.
"""

import functools
import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from timm.data import Mixup
from torch import nn
from torch.distributed.tensor import DTensor

from ssm_train.common.distributed import World
from ssm_train.common.precision import autocast
from ssm_train.data.on_device import OnDevice
from ssm_train.step.ema import Average
from ssm_train.step.losses import Criterion
from ssm_train.step.pretrained import Loaded
from ssm_train.step.schedule import Schedule


@dataclass
class Training:
    """Everything an optimizer update reads or changes, and how far the run has come."""

    network: nn.Module
    parallel: nn.Module  # `network`, or its DDP wrapper, compiled or not
    ema: Average | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    mixup: Mixup | None
    criterion: Criterion
    amp: str
    clip_grad: float
    on_device: OnDevice  # what images in 8 bits go through
    loaded: Loaded | None = None  # what it started from, in this process
    updates: int = 0  # optimizer updates made
    train_images: int = 0  # over all ranks
    train_seconds: float = 0.0
    seconds: float = 0.0  # training, validation and saving, of earlier processes of this run
    started: float = field(default_factory=time.perf_counter)  # of this process
    steps_here: int = 0  # micro-steps of this process

    @functools.cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that updates change."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @functools.cached_property
    def statistics(self) -> list[torch.Tensor]:
        """The buffers that checkpoints hold: running statistics of batch norms. They change in place."""
        saved = self.network.state_dict(keep_vars=True)
        return [tensor for tensor in saved.values() if not isinstance(tensor, nn.Parameter)]

    def elapsed(self) -> float:
        """Seconds of training, validation and saving, interruptions not counted."""
        return self.seconds + time.perf_counter() - self.started


def training_loss(run: Training, images: torch.Tensor, targets: torch.Tensor, *, mesa: bool = False) -> torch.Tensor:
    """Mix the batch, run the network, return the mean fp32 loss. images (B, C, S, S), normalised or in uint8, targets
    (B,).

    With `mesa` the averaged weights predict the same mixed batch, and the criterion draws the network towards that.
    """
    if images.dtype == torch.uint8:
        images = run.on_device(images)
    if run.mixup is not None:
        # targets become (B, K) probabilities, already smoothed
        images, targets = run.mixup(images, targets)
    copies = images if run.criterion.copies == 1 else torch.cat([images] * run.criterion.copies)
    with autocast(run.amp, images.device):
        logits = run.parallel(copies)
        average = None
        if mesa:
            # no_grad and not inference_mode: inference tensors must not enter the loss that autograd records
            with torch.no_grad():
                average = run.ema.module(images).float()
    return run.criterion(images, logits.float(), targets, average)


class Update(NamedTuple):
    """What became of an update. `overflow`: fp16 gradients too large for the scale, which is lowered by design."""

    made: bool
    overflow: bool
    stop: bool  # a process was asked to stop
    norm: float  # global gradient norm before clipping


def take_update(
    run: Training, world: World, *, losses: list[torch.Tensor], stop: bool, statistics: list[torch.Tensor] | None = None
) -> Update:
    """Clip, step, average; or skip, on all ranks together.

    `losses` of this rank, scalars; `stop`: this rank was asked to stop. What is shared is so in one exchange, and the
    host waits for the device once, because the learning rate, the data of a roll-back and a stop hang on the answer.
    A loss or gradient that is not finite on any rank skips the update on all: gradients are averaged, so one spoils
    all. Then neither the weights, nor the averages, nor the learning rate move, and running statistics go back to
    `statistics`, a copy from before the forward passes.
    """
    run.scaler.unscale_(run.optimizer)
    total = nn.utils.get_total_norm([p.grad for p in run.trained if p.grad is not None])
    if run.clip_grad:  # by a factor of 1 at most
        nn.utils.clip_grads_with_norm_(run.trained, run.clip_grad, total)
    norm = total.full_tensor() if isinstance(total, DTensor) else total
    bad = ~torch.stack(losses).isfinite().all()
    (norm,), (bad, stops) = world.read_with_sums(norm[None], torch.stack([bad, torch.full_like(bad, stop)]))
    made = not bad and math.isfinite(norm)
    overflow = False
    if made:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:
        scale = run.scaler.get_scale()  # waits for the device, where fp16 has a scale
        run.scaler.update()
        # at a scale of 1 there is nothing left to lower
        overflow = not bad and 1 < scale > run.scaler.get_scale()
    run.optimizer.zero_grad(set_to_none=True)
    if made:
        run.updates += 1
        run.schedule.set(run.updates)
        # each rank has seen other images; those of rank 0 are averaged, saved and evaluated
        world.broadcast(run.statistics)
        if run.ema is not None:
            run.ema.update()
    elif statistics is not None:
        _put_back(run, statistics)
    return Update(made, overflow, bool(stops), norm)


def forget_update(run: Training, statistics: list[torch.Tensor]) -> None:
    """Undo the micro-steps of an update that is not made here; `statistics` as in `take_update`."""
    run.optimizer.zero_grad(set_to_none=True)
    _put_back(run, statistics)


@torch.no_grad()
def _put_back(run: Training, statistics: list[torch.Tensor]) -> None:
    for own, before in zip(run.statistics, statistics, strict=True):
        own.copy_(before)
