"""Image folders with a random stream per sample, and what happens to unreadable images."""

import logging
import struct
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from classification.data.samplers import Key
from classification.data.transforms import Transform
from classification.distributed import World
from classification.errors import UserError
from classification.seeding import sample_rng

_log = logging.getLogger(__name__)

# what Pillow raises for missing, truncated, malformed and absurdly large files
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class BadImage(NamedTuple):
    path: str
    reason: str


class Sample(NamedTuple):
    """`image` (3, S, S) fp32, None for an unreadable validation image; `bad` names the files that could not be read."""

    image: torch.Tensor | None
    target: int
    bad: list[BadImage]


class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, S, S) fp32
    targets: torch.Tensor  # (B,) int64
    bad: list[BadImage]


class TrainImages(Dataset[Sample]):
    """Training images addressed by (epoch, index) keys, augmented by a stream seeded by (seed, epoch, index).

    An unreadable image is replaced by the next readable one, with its own label. After `max_bad` failures in a row the
    sample is a black image: the run is about to be stopped by `BadImages`, on all ranks at the same step.
    """

    def __init__(self, samples: list[tuple[str, int]], transform: Transform, *, seed: int, max_bad: int) -> None:
        self.samples = samples
        self._transform, self._seed = transform, seed
        self._tries = min(max_bad + 1, len(samples))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        bad: list[BadImage] = []
        image, target = Image.new("RGB", (1, 1)), 0
        for offset in range(self._tries):
            path, target = self.samples[(index + offset) % len(self.samples)]
            loaded = load_image(path)
            if not isinstance(loaded, BadImage):
                image = loaded
                break
            bad.append(loaded)
        with sample_rng(self._seed, epoch, index):
            return Sample(self._transform(image), target, bad)


class EvalImages(Dataset[Sample]):
    """Validation images addressed by (epoch, index) keys; the epoch has no effect."""

    def __init__(self, samples: list[tuple[str, int]], transform: Transform) -> None:
        self.samples = samples
        self._transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Sample:
        path, target = self.samples[key[1]]
        loaded = load_image(path)
        if isinstance(loaded, BadImage):
            return Sample(None, target, [loaded])
        return Sample(self._transform(loaded), target, [])


def load_image(path: str) -> Image.Image | BadImage:
    """The decoded RGB image, or why it cannot be had."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except _UNREADABLE as error:
        return BadImage(path, " ".join(str(error).split()))


def collate(samples: list[Sample]) -> Batch:
    """Stack the readable samples; B may be smaller than asked for, even 0."""
    readable = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in readable]) if readable else torch.empty(0)
    targets = torch.tensor([sample.target for sample in readable], dtype=torch.int64)
    return Batch(images, targets, [bad for sample in samples for bad in sample.bad])


class BadImages:
    """The unreadable images met so far: each is named once in the log; too many stop the run, on all ranks alike.

    `limit` is DATA.MAX_BAD_IMAGES for the training set of `total` images, None for validation, where they are left out.
    """

    def __init__(self, world: World, total: int, limit: int | None) -> None:
        self._world, self._total, self._limit = world, total, limit
        self._known: set[str] = set()
        self._new: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Distinct images up to the last `share`."""
        return len(self._known)

    def add(self, bad: list[BadImage]) -> None:
        """Remember what a batch of this rank reported."""
        self._new.update((entry.path, entry.reason) for entry in bad if entry.path not in self._known)

    def share(self) -> None:
        """Exchange the news between the ranks. All ranks must call it.

        Raises UserError on all ranks above the limit, or when nothing readable is left.
        """
        news: dict[str, str] = {}
        if self._world.sum([len(self._new)])[0]:
            for part in self._world.gather(self._new):
                news.update(part)
        self._new = {}
        action = "left out of the metrics" if self._limit is None else "replaced by the next readable one"
        for path in sorted(set(news) - self._known):
            _log.warning("unreadable image, %s: %s (%s)", action, path, news[path])
        self._known.update(news)
        if self._limit is not None and len(self._known) > min(self._limit, self._total - 1):
            raise UserError(
                f"{len(self._known)} of {self._total} training images are unreadable (DATA.MAX_BAD_IMAGES allows "
                f"{self._limit}): {', '.join(sorted(self._known)[:3])}, ...; repair or delete them, or raise the limit"
            )
