"""Validation: exact for any number of ranks and any batch size."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.precision import autocast
from ssm_train.common.preemption import StopRequest
from ssm_train.data.dataset import BadImages, Batch
from ssm_train.step.parallel import gathered


@dataclass(frozen=True)
class Accuracy:
    """Validation result over all ranks: top-1 and top-5 in percent (top-K where there are fewer classes), mean loss."""

    top1: float
    top5: float
    loss: float
    images: int


class Interrupted(Exception):
    """A rank was asked to stop during validation. Raised on all ranks alike."""


@torch.no_grad()
def validate(
    models: dict[str, nn.Module],
    loader: DataLoader,
    amp: str,
    world: World,
    bad: BadImages,
    stop: StopRequest,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    watch: Callable[[str, Batch, torch.Tensor], None] | None = None,
) -> dict[str, Accuracy]:
    """Evaluate all `models` in one pass over this rank's images: sums, exchanged once.

    `watch`(model's name, batch, logits (B, K) in fp32) is called for every batch with readable images. Others are left
    out. Raises UserError when none is readable, Interrupted when `stop` was set meanwhile.
    """
    # per model: loss, top-1 hits, top-5 hits, images
    sums = {name: torch.zeros(4, dtype=world.wide, device=world.device) for name in models}
    with gathered(models.values()):
        for batch in loader:
            if stop:
                break
            bad.add(batch.bad)
            if len(batch.targets) == 0:
                continue
            images = batch.images.to(world.device, non_blocking=True, memory_format=memory_format)
            targets = batch.targets.to(world.device, non_blocking=True)
            for name, model in models.items():
                model.eval()
                with autocast(amp, world.device):
                    logits = model(images).float()
                hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
                loss = F.cross_entropy(logits, targets, reduction="sum")
                sums[name] += torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_full((), len(targets))])
                if watch is not None:
                    watch(name, batch, logits)
    if world.sum([bool(stop)])[0]:
        raise Interrupted
    bad.share()
    totals = iter(world.sum(torch.cat(list(sums.values())).tolist()))
    results = {}
    for name in models:
        loss, top1, top5, images = (next(totals) for _ in range(4))
        if images == 0:
            first = bad.entries()[0]
            where = f"{first.path} ({first.reason})"
            raise UserError(f"no validation image is readable, e.g. {where}: repair them or change --data-path")
        results[name] = Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, int(images))
    return results
