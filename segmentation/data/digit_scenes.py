"""The embedded segmentation data set: scenes of handwritten digits (ssm_mm.digit_scenes) in the layout of ADE20K.

    python -m segmentation.data.digit_scenes --out DIR [--train 400] [--val 80]

DIR/images/{training,validation}/*.png and DIR/annotations/{training,validation}/*.png, made in seconds. Pixels of an
annotation are 1 for the background and 2 + d for the visible ink of digit d. 0, which in ADE20K means "other", does not
occur, and so the background is a class like the others after `reduce_zero_label`, as class 0 of 11. For mmsegmentation:

    dict(type="BaseSegDataset", metainfo=dict(classes=("background", *"0123456789")), reduce_zero_label=True,
         img_suffix=".png", data_root=DIR, data_prefix=dict(img_path="images/training", ...), ...)

(ADE20KDataset itself accepts only ADE20K's own class names.)
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ssm_mm.digit_scenes import Scene
from ssm_mm.scene_folder import scenes_command

_FOLDERS = {"train": "training", "val": "validation"}
_BACKGROUND, _FIRST_DIGIT = 1, 2


def label_map(scene: Scene) -> np.ndarray:
    """(H, W) uint8 as described above."""
    labels = np.full(scene.image.shape[:2], _BACKGROUND, np.uint8)
    for instance in scene.instances:
        labels[instance.mask] = _FIRST_DIGIT + instance.digit
    return labels


def write_split(folder: Path, split: str, scenes: Iterator[Scene]) -> None:
    """Images and annotations of one split under the folder of the data set."""
    images, annotations = (folder / kind / _FOLDERS[split] for kind in ("images", "annotations"))
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    for number, scene in enumerate(scenes, start=1):
        Image.fromarray(scene.image).save(images / f"{number:06d}.png")
        Image.fromarray(label_map(scene)).save(annotations / f"{number:06d}.png")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return scenes_command(argv, "python -m segmentation.data.digit_scenes", "ADE20K", write_split)


if __name__ == "__main__":
    sys.exit(main())
