"""The embedded data set of marine animal segmentation: camouflaged digits under water.

    python -m segmentation.data.camouflage --out DIR [--train 300] [--test 60]

DIR/{train,test}/Image/*.png and DIR/{train,test}/Masks/*.png, made in seconds, in the layout of `MarineDataset`. Masks
are 255 where any digit of a scene of `ssm_mm.digit_scenes` is visible (other digits in test than in train). A digit
has no colour of its own: it is a texture on another one, of the same colours and a little brighter or darker. Over all
lies a cast of blue and green, dark in some images and bright in others.

Image `number` of a split is the same whatever else is made: every choice is an integer of `Choices`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ssm_mm.digit_scenes import Choices, Scene
from ssm_mm.scene_folder import write_scenes
from ssm_train.common.command import run
from ssm_train.common.errors import UserError

_COUNTS = {"train": 300, "test": 60}
_FOLDERS = {"train": "train", "val": "test"}  # by the splits of digit_scenes
_KNOTS = (12, 16, 24, 32)  # of a texture, in either direction
_SHIFTS = (-65, -55, 55, 65)  # of the digits' brightness, of 255
_BRIGHTNESS = (110, 240)  # of the whole image, in 256ths
_CAST = ((70, 120), (180, 256), (190, 256))  # of red, green and blue, in 256ths


def animal_mask(scene: Scene) -> np.ndarray:
    """(H, W) bool: the visible ink of all digits."""
    return np.any([instance.mask for instance in scene.instances], axis=0)


def camouflage(mask: np.ndarray, choices: Choices) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a mask (H, W) bool."""
    height, width = mask.shape
    knots = choices.of(_KNOTS)
    ground = _texture(choices, knots, width, height)
    # finer or coarser than the ground
    animal = _texture(choices, choices.of((knots // 2, 2 * knots)), width, height) + choices.of(_SHIFTS)
    image = np.where(mask[..., None], animal, ground).clip(0, 255)
    brightness = choices.between(*_BRIGHTNESS)
    cast = np.array([choices.between(*limits) for limits in _CAST])
    return (image * cast * brightness >> 16).astype(np.uint8)


def _texture(choices: Choices, knots: int, width: int, height: int) -> np.ndarray:
    """(H, W, 3) int64: smooth grey noise with a little colour."""
    grey = np.array([choices.between(80, 180) for _ in range(knots * knots)]).reshape(knots, knots, 1)
    colour = np.array([choices.between(-25, 25) for _ in range(knots * knots * 3)]).reshape(knots, knots, 3)
    grid = Image.fromarray((grey + colour).astype(np.uint8))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)


def write_split(folder: Path, split: str, scenes: Iterator[Scene]) -> None:
    """Images and masks of one split of `digit_scenes` under the folder of the data set."""
    images, masks = (folder / _FOLDERS[split] / kind for kind in ("Image", "Masks"))
    images.mkdir(parents=True)
    masks.mkdir()
    for number, scene in enumerate(scenes, start=1):
        mask = animal_mask(scene)
        choices = Choices(f"camouflaged digits, version 1/{split}/{number}")
        Image.fromarray(camouflage(mask, choices)).save(images / f"{number:06d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{number:06d}.png")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m segmentation.data.camouflage", description="Write images of camouflaged digits and their masks."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    for split, count in _COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="number of images (default: %(default)s)")
    arguments = parser.parse_args(argv)

    def command() -> None:
        for split in _COUNTS:
            if getattr(arguments, split) < 1:
                raise UserError(f"--{split} {getattr(arguments, split)}: must be at least 1")
        counts = {"train": arguments.train, "val": arguments.test}
        written = write_scenes(arguments.out, "camouflage", counts, write_split)
        print(f"camouflaged digits: {arguments.out} " + ("written" if written else "is complete"))

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
