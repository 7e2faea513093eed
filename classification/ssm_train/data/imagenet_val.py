"""Sorts ImageNet's flat folder of 50,000 validation images into the folders of their classes.

    python -m ssm_train.data.imagenet_val --devkit ILSVRC2012_devkit_t12.tar.gz --val IMAGENET/val

The development kit (of image-net.org, beside the images) says which image is of which class; torchvision checks its MD5
sum and reads it. Images are moved within the folder, by their numbers, so a sorting that was stopped is finished by the
next call.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive

from ssm_train.common.command import run
from ssm_train.common.errors import UserError

_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def classes_of_images(devkit: Path) -> list[str]:
    """The WordNet number of every validation image, in the order of their own numbers (from 1). UserError for what is
    not the development kit."""
    if not devkit.is_file():
        raise UserError(f"--devkit {devkit} does not exist: image-net.org offers it beside the images")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(devkit, Path(folder) / devkit.name)
        try:
            parse_devkit_archive(folder, devkit.name)
        except RuntimeError as error:
            raise UserError(f"--devkit {devkit} is not ILSVRC2012_devkit_t12.tar.gz: its MD5 sum is another") from error
        return load_meta_file(folder)[1]


def sort_images(val: Path, classes: list[str]) -> int:
    """Move images into folders of `classes`; returns how many were moved. UserError, before any is moved, where images
    are missing or something else is there."""
    if not val.is_dir():
        raise UserError(f"--val {val} is not a folder")
    folders = set(classes)
    flat = [path for path in val.iterdir() if path.name not in folders]
    sorted_before = {path.name for name in folders for path in (val / name).glob("*.JPEG")}
    odd = next((path for path in flat if not _IMAGE.fullmatch(path.name)), None)
    if odd is not None:
        raise UserError(f"{odd} is no image called like ILSVRC2012_val_00000001.JPEG: move it away")
    found = {path.name for path in flat} | sorted_before
    wanted = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(classes) + 1)]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(f"{val} lacks {len(missing)} of {len(wanted)} images, e.g. {missing[0]}")
    for path in flat:
        number = int(_IMAGE.fullmatch(path.name)[1])
        if not 1 <= number <= len(classes):
            raise UserError(f"{path} is none of the {len(classes)} validation images: move it away")
    for path in flat:
        folder = val / classes[int(_IMAGE.fullmatch(path.name)[1]) - 1]
        folder.mkdir(exist_ok=True)
        os.rename(path, folder / path.name)
    return len(flat)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    prog = "python -m ssm_train.data.imagenet_val"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n")[0])
    parser.add_argument("--devkit", type=Path, required=True, metavar="FILE", help="ILSVRC2012_devkit_t12.tar.gz")
    parser.add_argument("--val", type=Path, required=True, metavar="FOLDER", help="of the validation images")
    args = parser.parse_args(argv)

    def command() -> None:
        moved = sort_images(args.val, classes_of_images(args.devkit))
        print(f"{args.val}: {moved} images moved into the folders of their classes")

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
