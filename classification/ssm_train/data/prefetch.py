"""Batches on the device one step ahead of their use."""

from collections.abc import Iterable, Iterator

import torch

from ssm_train.data.dataset import Batch


class DeviceBatches:
    """The batches of a loader, epoch after epoch, with images and targets on `device`.

    On a GPU the copy of the next batch runs on a stream of its own, one for all epochs, while the current one is
    computed with.
    """

    def __init__(self, loader: Iterable[Batch], device: torch.device, memory_format: torch.memory_format) -> None:
        self._loader, self._device, self._memory_format = loader, device, memory_format
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        return self._arranged() if self._stream is None else self._copied_ahead(self._stream)

    def _arranged(self) -> Iterator[Batch]:
        for batch in self._loader:
            images = batch.images.to(self._device)
            # a batch without a readable image has no dimensions to arrange
            images = images.to(memory_format=self._memory_format) if len(batch.targets) else images
            yield batch._replace(images=images, targets=batch.targets.to(self._device))

    def _copied_ahead(self, stream: torch.cuda.Stream) -> Iterator[Batch]:
        ahead: tuple[Batch, torch.cuda.Event] | None = None
        for batch in self._loader:
            with torch.cuda.stream(stream):
                images = batch.images.to(self._device, non_blocking=True)
                if len(batch.targets):
                    images = images.contiguous(memory_format=self._memory_format)
                moved = batch._replace(images=images, targets=batch.targets.to(self._device, non_blocking=True))
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
