"""One epoch of training, one validation, and the throughput measurement.

Legend: B images per process and micro-step, S image size, K classes. An optimizer update takes ACCUMULATION_STEPS
micro-steps on every process.
"""

import contextlib
import datetime
import logging
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode as CN

from classification.data.dataset import BadImages
from classification.distributed import World
from classification.errors import UserError
from classification.logger import RunLog, peak_memory_mb
from classification.seeding import seed_step

_log = logging.getLogger(__name__)


@dataclass
class Training:
    """Everything an optimizer update reads or changes, and how far the run has come."""

    network: nn.Module
    parallel: nn.Module  # `network`, or its DDP wrapper
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: CosineLRScheduler
    updates_per_epoch: int
    scaler: torch.amp.GradScaler
    mixup: Mixup | None
    label_smoothing: float
    updates: int = 0  # completed optimizer updates
    train_images: int = 0  # over all ranks
    train_seconds: float = 0.0
    seconds: float = 0.0  # training, validation and saving, of earlier processes of this run
    started: float = field(default_factory=time.perf_counter)  # of this process
    steps_here: int = 0  # micro-steps of this process

    def elapsed(self) -> float:
        """Seconds of training, validation and saving, interruptions not counted."""
        return self.seconds + time.perf_counter() - self.started


@dataclass(frozen=True)
class Accuracy:
    """Validation result over all ranks: top-1 and top-5 in percent (top-K where there are fewer classes), mean loss."""

    top1: float
    top5: float
    loss: float
    images: int


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The precision context of forward passes; `amp` is bf16, fp16 or off."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def training_loss(run: Training, images: torch.Tensor, targets: torch.Tensor, amp: str) -> torch.Tensor:
    """Mix the batch, run the network, return the mean fp32 cross-entropy. images (B, 3, S, S), targets (B,)."""
    smoothing = run.label_smoothing
    if run.mixup is not None:
        # targets become (B, K) probabilities, already smoothed
        images, targets = run.mixup(images, targets)
        smoothing = 0.0
    with autocast(amp, images.device):
        logits = run.parallel(images)
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def apply_update(run: Training, clip_grad: float) -> torch.Tensor:
    """Clip, step, average. Returns the global gradient norm before clipping.

    When the scaler finds an overflow it skips the step, and then neither the learning rate nor the average moves on.
    """
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.network.parameters(), clip_grad or math.inf)
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.scaler.get_scale() >= scale:
        run.updates += 1
        run.scheduler.step_update(run.updates)
        if run.ema is not None:
            run.ema.update(run.network)
    return norm


def train_one_epoch(
    run: Training, loader: DataLoader, epoch: int, cfg: CN, world: World, log: RunLog, bad: BadImages
) -> None:
    """Train epoch number `epoch` (from 0). Raises UserError for too many bad images and for a run that diverges."""
    run.parallel.train()
    loader.batch_sampler.set_epoch(epoch)
    steps, accumulation = len(loader), cfg.TRAIN.ACCUMULATION_STEPS
    batches = iter(loader)
    interval = _Interval(world)
    norm = torch.zeros(())
    for step in range(steps):
        with interval.waiting():
            batch = next(batches)
        bad.add(batch.bad)
        images = batch.images.to(world.device, non_blocking=True)
        targets = batch.targets.to(world.device, non_blocking=True)
        seed_step(cfg.SEED, epoch * steps + step, world.rank)
        rate = run.optimizer.param_groups[0]["lr"]
        closing = (step + 1) % accumulation == 0
        # gradients are exchanged once per update, with the last micro-step
        skip_exchange = world.size > 1 and not closing
        with run.parallel.no_sync() if skip_exchange else contextlib.nullcontext():
            loss = training_loss(run, images, targets, cfg.AMP)
            run.scaler.scale(loss / accumulation).backward()
        if closing:
            norm = apply_update(run, cfg.TRAIN.CLIP_GRAD)
        interval.add(loss.detach(), len(images))
        run.steps_here += 1
        if (step + 1) % cfg.PRINT_FREQ == 0 or step + 1 == steps:
            bad.share()
            values = interval.finish(run)
            remaining = (cfg.TRAIN.EPOCHS - epoch) * steps - step - 1
            eta = (time.perf_counter() - run.started) / run.steps_here * remaining
            values |= {"lr": rate, "grad_norm": norm.item(), "eta_seconds": eta}
            values["memory_mb"] = peak_memory_mb(world.device)
            if run.scaler.is_enabled():
                values["loss_scale"] = run.scaler.get_scale()
            log.record("train", run.updates, {"epoch": epoch + 1, "iteration": step + 1, **values})
            _log.info("%s", _progress_line(epoch, step, steps, cfg, values))
            # the scaler expects overflows and skips their steps
            if not math.isfinite(values["loss"]) and not run.scaler.is_enabled():
                raise _diverged(f"the loss became {values['loss']}", epoch, step)
    # the last update has not been through a loss yet, and the weights are about to be saved
    if not all(parameter.isfinite().all() for parameter in run.network.parameters()):
        raise _diverged("weights became infinite or nan", epoch, steps - 1)


def _diverged(what: str, epoch: int, step: int) -> UserError:
    return UserError(
        f"{what} in epoch {epoch + 1}, by iteration {step + 1}; the last checkpoint is intact: continue with --resume "
        "auto and a lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or --amp off"
    )


class _Interval:
    """Sums between two progress lines."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._world.device)
        self._steps = self._images = 0
        self._waited = 0.0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, loss: torch.Tensor, images: int) -> None:
        # stays on the device: reading it would stop the GPU at every step
        self._loss += loss
        self._steps += 1
        self._images += images

    def finish(self, run: Training) -> dict[str, float]:
        """Mean loss and images/s over all ranks, mean share of waiting; adds to the run's totals and starts anew."""
        loss = self._loss.item()
        seconds = time.perf_counter() - self._start
        loss, steps, images, share = self._world.sum([loss, self._steps, self._images, self._waited / seconds])
        run.train_images += int(images)
        run.train_seconds += seconds
        self._reset()
        return {"loss": loss / steps, "images_per_second": images / seconds, "data_wait": share / self._world.size}


def _progress_line(epoch: int, step: int, steps: int, cfg: CN, values: dict[str, float]) -> str:
    eta = datetime.timedelta(seconds=round(values["eta_seconds"]))
    return (
        f"epoch {epoch + 1}/{cfg.TRAIN.EPOCHS} [{step + 1}/{steps}] loss {values['loss']:.4f} lr {values['lr']:.3g} "
        f"grad {values['grad_norm']:.2f} {values['images_per_second']:.0f} img/s data {values['data_wait']:.0%} "
        f"eta {eta} mem {values['memory_mb']:.0f} MB"
    )


@torch.inference_mode()
def validate(
    models: dict[str, nn.Module], loader: DataLoader, cfg: CN, world: World, bad: BadImages
) -> dict[str, Accuracy]:
    """Evaluate all `models` in one pass over this rank's images. Exact for any number of ranks: sums, exchanged once.

    Unreadable images are left out. Raises UserError when none is readable.
    """
    # per model: loss, top-1 hits, top-5 hits, images
    sums = {name: torch.zeros(4, dtype=torch.float64, device=world.device) for name in models}
    for batch in loader:
        bad.add(batch.bad)
        if len(batch.targets) == 0:
            continue
        images = batch.images.to(world.device, non_blocking=True)
        targets = batch.targets.to(world.device, non_blocking=True)
        for name, model in models.items():
            model.eval()
            with autocast(cfg.AMP, world.device):
                logits = model(images).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            sums[name] += torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(targets))])
    bad.share()
    totals = iter(world.sum(torch.cat(list(sums.values())).tolist()))
    results = {}
    for name in models:
        loss, top1, top5, images = (next(totals) for _ in range(4))
        if images == 0:
            raise UserError(
                f"no validation image in {cfg.DATA.DATA_PATH} is readable: repair them or change --data-path"
            )
        results[name] = Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, int(images))
    return results


@torch.inference_mode()
def measure_throughput(
    model: nn.Module, cfg: CN, device: torch.device, *, repeats: int = 5, seconds: float = 0.5
) -> float:
    """Inference images/s of one process on synthetic images: median of `repeats` timings of about `seconds` each."""
    model.eval()
    size = cfg.DATA.IMG_SIZE
    images = torch.randn(cfg.DATA.BATCH_SIZE, 3, size, size, device=device)

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            with autocast(cfg.AMP, device):
                model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed(2)  # compiles kernels and fills caches
    count = max(1, math.ceil(seconds / timed(1)))
    return statistics.median(count * len(images) / timed(count) for _ in range(repeats))
