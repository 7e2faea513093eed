"""Images with a random stream per sample, and what happens to unreadable ones."""

import logging
import math
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ssm_models.printable import printable
from ssm_train.common.decode import UNREADABLE
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.seeding import seed_sample
from ssm_train.data.samplers import Key
from ssm_train.data.sources import ImageSource
from ssm_train.data.transforms import Transform

_log = logging.getLogger(__name__)

_MOST_TRIES, _NEIGHBOURS = 64, 32  # reads in the place of an unreadable image
_MOST_NAMED = 50  # unreadable images that the log names


class BadImage(NamedTuple):
    path: str
    reason: str


class Sample(NamedTuple):
    """`image` (C, S, S) as its transform makes it, None for an unreadable validation image; `bad` names what could not
    be read; `hopeless` says that nothing was found in its place."""

    image: torch.Tensor | None
    target: int
    bad: list[BadImage]
    key: Key
    hopeless: bool = False


class Batch(NamedTuple):
    images: torch.Tensor  # (B, C, S, S) fp32, or uint8 as `OnDevice` takes them
    targets: torch.Tensor  # (B,) int64
    bad: list[BadImage]
    keys: list[Key]  # B, of what was asked for; a replaced training image keeps the key of the bad one
    hopeless: bool = False  # one of the training images could not be replaced


class TrainImages(Dataset[Sample]):
    """Training images addressed by keys, augmented by a stream seeded by (seed, key).

    An unreadable image is replaced by the next readable one, with its own label. After more failures in a row than
    `max_bad_share` of the images allows, and than _MOST_TRIES, the last of which look all over the data, the sample is
    a black image and `hopeless`: the run is about to be stopped by `BadImages`, on all ranks at the same step.
    """

    def __init__(self, source: ImageSource, transform: Transform, *, seed: int, max_bad_share: float) -> None:
        self._source, self._transform, self._seed = source, transform, seed
        self._tries = min(allowed_bad(max_bad_share, len(source)) + 1, _MOST_TRIES)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: Key) -> Sample:
        bad: list[BadImage] = []
        for attempt in range(self._tries):
            index = (key.index + _offset(attempt, len(self._source))) % len(self._source)
            seed_sample(self._seed, *key)
            image = load_image(self._source, index, self._transform)
            if not isinstance(image, BadImage):
                return Sample(image, int(self._source.targets[index]), bad, key)
            bad.append(image)
        black = self._transform(self._source.decoder.converted(Image.new("RGB", (1, 1))))
        return Sample(black, int(self._source.targets[key.index]), bad, key, hopeless=True)


class EvalImages(Dataset[Sample]):
    """Validation images addressed by keys; only their index has an effect."""

    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self._source, self._transform = source, transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: Key) -> Sample:
        image = load_image(self._source, key.index, self._transform)
        target = int(self._source.targets[key.index])
        if isinstance(image, BadImage):
            return Sample(None, target, [image], key)
        return Sample(image, target, [], key)


def _offset(attempt: int, total: int) -> int:
    """Where to look in the place of an unreadable image: at its neighbours, then far away, for they may all be bad."""
    return attempt if attempt < _NEIGHBOURS or total <= _MOST_TRIES else attempt * (total // _MOST_TRIES) + attempt


def load_image(source: ImageSource, index: int, transform: Transform = lambda image: image) -> Any:
    """The transformed image, or why it cannot be had, as a BadImage."""
    try:
        return transform(source.decode(source.read(index)))
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return BadImage(printable(source.name(index)), printable(reason))


def collate(samples: list[Sample]) -> Batch:
    """Stack the readable samples; B may be smaller than asked for, even 0."""
    readable = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in readable]) if readable else torch.empty(0)
    targets = torch.tensor([sample.target for sample in readable], dtype=torch.int64)
    bad = [each for sample in samples for each in sample.bad]
    return Batch(images, targets, bad, [s.key for s in readable], any(s.hopeless for s in samples))


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
        self._hopeless = False

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

    def add(self, bad: list[BadImage], hopeless: bool = False) -> None:
        """Remember what a batch of this rank reported."""
        self._new.update((entry.path, entry.reason) for entry in bad if entry.path not in self._known)
        self._hopeless |= hopeless

    def share(self) -> None:
        """Exchange the news between the ranks. All ranks must call it, also before a checkpoint takes the state.

        Raises UserError on all ranks above the limit, or when nothing readable is left.
        """
        news: dict[str, str] = {}
        found, hopeless = self._world.sum([len(self._new), self._hopeless])
        if found:
            for part in self._world.gather(self._new):
                news.update(part)
        self._new = {}
        action = "left out of the metrics" if self._max_share is None else "replaced by the next readable one"
        fresh = sorted(news.keys() - self._known.keys())
        named = max(_MOST_NAMED - len(self._known), 0)
        for path in fresh[:named]:
            _log.warning("unreadable image, %s: %s (%s)", action, path, news[path])
        if len(self._known) <= _MOST_NAMED < len(self._known) + len(fresh):
            _log.warning("more than %d images are unreadable; the others are not named here", _MOST_NAMED)
        self._known |= news
        if self._max_share is None:
            return
        allowed = allowed_bad(self._max_share, self._total)
        if self.count > allowed or hopeless:
            (first, reason), *others = self.entries()[:3]
            raise UserError(
                f"{self.count} of {self._total} training images are unreadable ({self.count / self._total:.2%}), "
                + ("and all that were tried in the place of one: " if hopeless else "but ")
                + f"DATA.MAX_BAD_SHARE {self._max_share:g} allows {allowed} of {self._total}: "
                f"{', '.join([first, *(other.path for other in others)])}, ...; the first one: {reason}; repair or "
                "delete them, or raise the share"
            )
