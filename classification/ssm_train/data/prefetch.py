"""Batches on the device one step ahead of their use."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from ssm_train.data.dataset import Batch


def device_batches(loader: DataLoader, device: torch.device, memory_format: torch.memory_format) -> Iterator[Batch]:
    """The batches of `loader` with images and targets on `device`.

    On a GPU the copy of the next batch runs on a stream of its own while the current one is computed with.
    """
    if device.type != "cuda":
        for batch in loader:
            # a batch without a readable image has no dimensions to arrange
            yield batch._replace(images=batch.images.to(memory_format=memory_format)) if len(batch.targets) else batch
        return
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in loader:
        with torch.cuda.stream(stream):
            images = batch.images.to(device, non_blocking=True)
            if len(batch.targets):
                images = images.contiguous(memory_format=memory_format)
            moved = batch._replace(images=images, targets=batch.targets.to(device, non_blocking=True))
            copied = stream.record_event()
        if ahead is not None:
            yield _ready(*ahead)
        ahead = moved, copied
    if ahead is not None:
        yield _ready(*ahead)


def _ready(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """`batch`, once its copy is done as seen from the current stream, which then owns the memory."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in (batch.images, batch.targets):
        tensor.record_stream(current)
    return batch
