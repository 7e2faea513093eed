"""Pictures of several handwritten digits, with the visible part of each: one source for detection and segmentation.

A scene is a dark textured canvas with 3 to 8 of scikit-learn's 1,797 real digits on it, enlarged from the 8x8 scans to
about 20 to 56 pixels in height, rotated by up to 15 degrees, in colours brighter than the canvas: weights trained on
the classification's grey 32x32 digits know them. Digits may cover each other; at most 40 % of a digit's ink is hidden.

Classes 0 to 9. Split: within each class every fifth scan, in scikit-learn's order, is seen in validation scenes only,
and the others in training scenes only, as in the classification's digits.

Scene `number` of a split is the same whatever else is made, and with every version of numpy: every choice is an integer
of `Choices`, which hashes, and all arithmetic on pixels is on integers or Pillow's. (Files can differ from one version
of Pillow to another, in how PNG compresses or in how an enlarged digit is rounded.)
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

SPLITS = ("train", "val")
DIGITS = tuple("0123456789")
FEWEST, MOST = 3, 8  # digits of a scene
MIN_VISIBLE = 0.6  # of a digit's ink, at the end

_VAL_EVERY = 5
_LARGEST_PIXEL = 16  # the scans count ink pixels of 4x4 blocks
_SIDES = (128, 144, 160)
_SIZES = (22, 48)  # of the square enlarged scan; its ink is narrower, and higher when it is rotated
_ROTATION = 15  # degrees, to either side
_INK = 96  # of 255: from this coverage on a pixel belongs to the digit
_INK_LUMA = 140  # least brightness of a digit's colour, of 255
_CANVAS_LEVEL = 88  # brightest channel of a canvas before its lines
_LINE_LEVEL = 120
_SHARED_BOX = 0.3  # largest part of the smaller of two boxes that the other may cover
_ATTEMPTS = 500

T = TypeVar("T")


class Instance(NamedTuple):
    """One digit of a scene."""

    digit: int
    scan: int  # position in scikit-learn's order
    mask: np.ndarray  # (H, W) bool, the ink that no other digit hides
    ink: int  # pixels of the digit, hidden ones included


class Scene(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8, RGB
    instances: tuple[Instance, ...]  # from the rearmost to the foremost


class Choices:
    """Integers that depend on `key` alone: number i is the first 64 bits of SHA-256 of "key/i", scaled to a range."""

    def __init__(self, key: str) -> None:
        self._key, self._count = key, 0

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        bits = hashlib.sha256(f"{self._key}/{self._count}".encode()).digest()[:8]
        self._count += 1
        return low + (int.from_bytes(bits, "big") * (high - low + 1) >> 64)

    def of(self, options: Sequence[T]) -> T:
        """An element of a sequence."""
        return options[self.between(0, len(options) - 1)]


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 grey levels and (1797,) classes."""
    # scikit-learn takes a second to import
    from sklearn.datasets import load_digits

    scans, targets = load_digits(return_X_y=True)
    grey = np.round(scans * (255 / _LARGEST_PIXEL))
    return grey.reshape(-1, 8, 8).astype(np.uint8), targets


@functools.cache
def scans_of(split: str, digit: int) -> tuple[int, ...]:
    """The scans, by position in scikit-learn's order, that scenes of `split` ("train" or "val") show of a class."""
    of_class = np.flatnonzero(_scans()[1] == digit).tolist()
    held_out = of_class[_VAL_EVERY - 1 :: _VAL_EVERY]
    return tuple(held_out if split == "val" else sorted(set(of_class) - set(held_out)))


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a mask (H, W) bool that is not empty, in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def make_scene(split: str, number: int) -> Scene:
    """Scene `number` (from 0 on) of `split`, "train" or "val"."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    choices = Choices(f"digit scenes, version 1/{split}/{number}")
    image = _canvas(choices, width=choices.of(_SIDES), height=choices.of(_SIDES))
    wanted = choices.between(FEWEST, MOST)
    instances: list[Instance] = []
    for _ in range(_ATTEMPTS):  # a crowded scene ends with fewer digits than wanted: there is always room for three
        digit = choices.between(0, 9)
        scan = choices.of(scans_of(split, digit))
        coverage = _place(_digit(choices, scan), choices, image.shape[:2])
        mask = coverage >= _INK
        behind = [instance._replace(mask=instance.mask & ~mask) for instance in instances]
        if _is_legible(mask, instances, behind):
            instances = [*behind, Instance(digit, scan, mask, int(mask.sum()))]
            image = _paint(image, coverage, _ink_colour(choices))
        if len(instances) == wanted:
            break
    return Scene(image, tuple(instances))


def _canvas(choices: Choices, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8: a colour gradient (2x2 knots) or smooth noise of a finer grid, often under lines and arcs."""
    knots, level = choices.of((2, 4, 8, 16, 32)), choices.between(_CANVAS_LEVEL // 4, _CANVAS_LEVEL)
    grid = np.array([choices.between(0, level) for _ in range(knots * knots * 3)], np.uint8).reshape(knots, knots, 3)
    canvas = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for _ in range(choices.of((0, 4, 8, 16))):
        colour = tuple(choices.between(0, _LINE_LEVEL) for _ in range(3))
        thickness = choices.between(1, 3)
        x, y = choices.between(0, width - 1), choices.between(0, height - 1)
        if choices.of(("line", "arc")) == "line":
            ends = x, y, x + choices.between(-60, 60), y + choices.between(-60, 60)
            pen.line(ends, colour, thickness)
        else:
            around = x, y, x + choices.between(10, 60), y + choices.between(10, 60)
            start = choices.between(0, 359)
            pen.arc(around, start, start + choices.between(40, 200), colour, thickness)
    return np.asarray(canvas)


def _digit(choices: Choices, scan: int) -> np.ndarray:
    """(h, w) uint8 coverage by ink of an enlarged and rotated scan, without empty rows and columns around it."""
    size = choices.between(*_SIZES)
    grey = Image.fromarray(_scans()[0][scan]).resize((size, size), Image.Resampling.BICUBIC)
    grey = grey.rotate(choices.between(-_ROTATION, _ROTATION), Image.Resampling.BICUBIC, expand=True)
    return np.asarray(grey.crop(grey.getbbox()))


def _place(digit: np.ndarray, choices: Choices, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8: `digit` somewhere on an empty canvas, wholly inside it."""
    (height, width), placed = digit.shape, np.zeros(shape, np.uint8)
    top, left = choices.between(0, shape[0] - height), choices.between(0, shape[1] - width)
    placed[top : top + height, left : left + width] = digit
    return placed


def _is_legible(mask: np.ndarray, instances: list[Instance], behind: list[Instance]) -> bool:
    """Whether a digit may be added over `instances`, of which it leaves `behind`."""
    if any(instance.mask.sum() < MIN_VISIBLE * instance.ink for instance in behind):
        return False
    left, top, width, height = box_of(mask)
    for instance in instances:
        x, y, w, h = box_of(instance.mask)
        shared_width = min(left + width, x + w) - max(left, x)
        shared_height = min(top + height, y + h) - max(top, y)
        shared = max(shared_width, 0) * max(shared_height, 0)
        if shared > _SHARED_BOX * min(width * height, w * h):
            return False
    return True


def _ink_colour(choices: Choices) -> np.ndarray:
    """(3,) a colour of at least the luma _INK_LUMA (ITU-R 601 weights, in thousandths)."""
    while True:
        colour = np.array([choices.between(60, 255) for _ in range(3)], np.int32)
        if colour @ (299, 587, 114) >= 1000 * _INK_LUMA:
            return colour


def _paint(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """`colour` over `image` where `coverage` is 255, less where it is less."""
    ink = coverage[..., None].astype(np.int32)
    return ((image * (255 - ink) + colour * ink + 127) // 255).astype(np.uint8)
