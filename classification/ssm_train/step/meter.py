"""What happens between two progress lines: mean loss, images/s, share of time spent waiting for data."""

import contextlib
import time
from collections.abc import Iterator

import torch

from ssm_train.common.distributed import World
from ssm_train.step.engine import Training


class Meter:
    """Sums of one rank; `finish` makes means over all ranks of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), dtype=self._world.wide, device=self._world.device)
        self._steps = self._images = 0
        self._waited = 0.0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: it is no training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, loss: torch.Tensor, images: int) -> None:
        """One micro-step."""
        # stays on the device: reading it would stop the GPU at every step
        self._loss += loss
        self._steps += 1
        self._images += images

    def finish(self, run: Training) -> dict[str, float]:
        """Means since the last call; adds to the run's totals and starts anew. All ranks must call it."""
        loss = self._loss.item()
        seconds = time.perf_counter() - self._start
        loss, steps, images, share = self._world.sum([loss, self._steps, self._images, self._waited / seconds])
        run.train_images += int(images)
        run.train_seconds += seconds
        self._reset()
        return {"loss": loss / steps, "images_per_second": images / seconds, "data_wait": share / self._world.size}
