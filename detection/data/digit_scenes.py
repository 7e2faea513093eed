"""The embedded detection data set: scenes of handwritten digits (ssm_mm.digit_scenes) in COCO format.

    python -m detection.data.digit_scenes --out DIR [--train 400] [--val 80]

DIR/{train2017,val2017}/*.png and DIR/annotations/instances_{train2017,val2017}.json, made in seconds. Ten categories
named "0" to "9", with the ids 1 to 10. Box, area and mask of an annotation are those of the digit's visible ink. Masks
are uncompressed run lengths, exact to the pixel (polygons have no holes, and zeros do); pycocotools and mmdet read
them. "scan" of an annotation is the position of the digit in scikit-learn's order. For mmdet:

    dict(type="CocoDataset", metainfo=dict(classes=tuple("0123456789")), data_root=DIR, ...)
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ssm_mm.digit_scenes import DIGITS, Instance, Scene, box_of
from ssm_mm.scene_folder import scenes_command


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed code of a mask (H, W) bool: lengths of the runs of 0, 1, 0, ..., column after column."""
    pixels = np.concatenate([[False], mask.ravel(order="F")])  # runs begin with one of 0, which may be empty
    starts = np.flatnonzero(pixels[1:] != pixels[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *starts, mask.size]).tolist()}


def _annotation(instance: Instance, number: int, image: int) -> dict:
    return {
        "id": number,
        "image_id": image,
        "category_id": instance.digit + 1,
        "bbox": list(box_of(instance.mask)),
        "area": int(instance.mask.sum()),
        "iscrowd": 0,
        "segmentation": run_lengths(instance.mask),
        "scan": instance.scan,
    }


def write_split(folder: Path, split: str, scenes: Iterator[Scene]) -> None:
    """Images and annotations of one split under the folder of the data set. Ids of both begin with 1."""
    images, annotations = [], []
    (folder / f"{split}2017").mkdir()
    (folder / "annotations").mkdir(exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        height, width, _ = scene.image.shape
        name = f"{number:06d}.png"
        Image.fromarray(scene.image).save(folder / f"{split}2017" / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for instance in scene.instances:
            annotations.append(_annotation(instance, len(annotations) + 1, number))
    categories = [{"id": i, "name": name, "supercategory": "digit"} for i, name in enumerate(DIGITS, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return scenes_command(argv, "python -m detection.data.digit_scenes", "COCO", write_split)


if __name__ == "__main__":
    sys.exit(main())
