"""Images with a random stream per sample, and what happens to unreadable ones."""

import logging
import math
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ssm_train.common.decode import UNREADABLE
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.seeding import seed_sample
from ssm_train.data.samplers import Key
from ssm_train.data.sources import ImageSource
from ssm_train.data.transforms import Transform

_log = logging.getLogger(__name__)


class BadImage(NamedTuple):
    path: str
    reason: str


class Sample(NamedTuple):
    """`image` (C, S, S) fp32, None for an unreadable validation image; `bad` names what could not be read."""

    image: torch.Tensor | None
    target: int
    bad: list[BadImage]
    key: Key


class Batch(NamedTuple):
    images: torch.Tensor  # (B, C, S, S) fp32
    targets: torch.Tensor  # (B,) int64
    bad: list[BadImage]
    keys: list[Key]  # B, of what was asked for; a replaced training image keeps the key of the bad one


class TrainImages(Dataset[Sample]):
    """Training images addressed by keys, augmented by a stream seeded by (seed, key).

    An unreadable image is replaced by the next readable one, with its own label. After more failures in a row than
    `max_bad_share` of the images allows, the sample is a black image: the run is about to be stopped by `BadImages`, on
    all ranks at the same step.
    """

    def __init__(self, source: ImageSource, transform: Transform, *, seed: int, max_bad_share: float) -> None:
        self._source, self._transform, self._seed = source, transform, seed
        self._tries = allowed_bad(max_bad_share, len(source)) + 1

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: Key) -> Sample:
        bad: list[BadImage] = []
        image, index = self._source.decoder.converted(Image.new("RGB", (1, 1))), key.index
        for offset in range(self._tries):
            index = (key.index + offset) % len(self._source)
            loaded = load_image(self._source, index)
            if not isinstance(loaded, BadImage):
                image = loaded
                break
            bad.append(loaded)
        seed_sample(self._seed, *key)
        return Sample(self._transform(image), int(self._source.targets[index]), bad, key)


class EvalImages(Dataset[Sample]):
    """Validation images addressed by keys; only their index has an effect."""

    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self._source, self._transform = source, transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: Key) -> Sample:
        loaded, target = load_image(self._source, key.index), int(self._source.targets[key.index])
        if isinstance(loaded, BadImage):
            return Sample(None, target, [loaded], key)
        return Sample(self._transform(loaded), target, [], key)


def load_image(source: ImageSource, index: int) -> Image.Image | BadImage:
    """The decoded image, or why it cannot be had."""
    try:
        return source.decode(source.read(index))
    except UNREADABLE as error:
        return BadImage(source.name(index), " ".join(str(error).split()) or type(error).__name__)


def collate(samples: list[Sample]) -> Batch:
    """Stack the readable samples; B may be smaller than asked for, even 0."""
    readable = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in readable]) if readable else torch.empty(0)
    targets = torch.tensor([sample.target for sample in readable], dtype=torch.int64)
    return Batch(images, targets, [bad for sample in samples for bad in sample.bad], [s.key for s in readable])


def allowed_bad(share: float, total: int) -> int:
    """How many of `total` training images may be unreadable: not all of them, whatever the share."""
    # the small number undoes the rounding of products like 0.29 * 100
    return min(math.floor(share * total + 1e-9), total - 1)


class BadImages:
    """The unreadable images met so far: each is named once in the log; too many stop the run, on all ranks alike.

    `max_share` is DATA.MAX_BAD_SHARE for the training set of `total` images, None for validation, where they are left
    out.
    """

    def __init__(self, world: World, total: int, max_share: float | None) -> None:
        self._world, self._total, self._max_share = world, total, max_share
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Distinct images up to the last `share`."""
        return len(self._known)

    def entries(self) -> list[BadImage]:
        """The images up to the last `share`, sorted by path: the same on all ranks."""
        return [BadImage(path, reason) for path, reason in sorted(self._known.items())]

    def state(self) -> dict[str, str]:
        """path -> reason up to the last `share`, for a checkpoint."""
        return dict(self._known)

    def load(self, state: dict[str, str]) -> None:
        """Continue from `state`; what it names is counted, but not logged again."""
        self._known, self._new = dict(state), {}

    def add(self, bad: list[BadImage]) -> None:
        """Remember what a batch of this rank reported."""
        self._new.update((entry.path, entry.reason) for entry in bad if entry.path not in self._known)

    def share(self) -> None:
        """Exchange the news between the ranks. All ranks must call it, also before a checkpoint takes the state.

        Raises UserError on all ranks above the limit, or when nothing readable is left.
        """
        news: dict[str, str] = {}
        if self._world.sum([len(self._new)])[0]:
            for part in self._world.gather(self._new):
                news.update(part)
        self._new = {}
        action = "left out of the metrics" if self._max_share is None else "replaced by the next readable one"
        for path in sorted(news.keys() - self._known.keys()):
            _log.warning("unreadable image, %s: %s (%s)", action, path, news[path])
        self._known |= news
        if self._max_share is None:
            return
        allowed = allowed_bad(self._max_share, self._total)
        if self.count > allowed:
            (first, reason), *others = self.entries()[:3]
            raise UserError(
                f"{self.count} of {self._total} training images are unreadable ({self.count / self._total:.2%}), but "
                f"DATA.MAX_BAD_SHARE {self._max_share:g} allows {allowed} of {self._total}: "
                f"{', '.join([first, *(other.path for other in others)])}, ...; the first one: {reason}; repair or "
                "delete them, or raise the share"
            )
