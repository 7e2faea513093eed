"""The embedded data set: scikit-learn's 1,797 real handwritten digits as an ImageFolder tree.

    python -m ssm_train.data.digits --out DIR

DIR/{train,val}/<0-9>/digit_<number>.png, grey, 32x32, enlarged bicubically from the 8x8 scans; <number> is the position
in scikit-learn's order. Split: within each class every fifth scan, in that order, is validation (355 in all), the rest
training (1,442). Nothing in it is random, so it is the same with every version of every library.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ssm_train.common.command import run
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import is_disk_full, write_synced
from ssm_train.common.new_folder import MadeMeanwhile, new_folder

_SIZE = 32
_VAL_EVERY = 5
_LARGEST_PIXEL = 16  # the scans count ink pixels of 4x4 blocks
_MANIFEST = "digits.json"  # path -> sha256 of every image; written with the tree, so it exists only when all is there


def split_digits(targets: np.ndarray) -> list[str]:
    """ "train" or "val" for every scan: every fifth of a class, in the given order, is "val"."""
    seen = dict.fromkeys(np.unique(targets).tolist(), 0)
    splits = []
    for target in targets.tolist():
        seen[target] += 1
        splits.append("train" if seen[target] % _VAL_EVERY else "val")
    return splits


def write_digits(out: Path) -> bool:
    """Write the tree once; returns whether it had to be written.

    It is built aside and renamed, so a tree under `out` is complete. One that is there is compared with its manifest
    and left alone. Raises UserError for a damaged tree, a folder that holds something else and a full disk.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            _verify(out)
            return False
        with new_folder(out) as aside:
            _write_tree(aside)
    except MadeMeanwhile:
        _verify(out)
        return False
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"no room left for the digits in {out.parent}: free 8 MB and run again") from error
        raise UserError(f"cannot write the digits to {out}: {error.strerror}") from error
    return True


def _write_tree(folder: Path) -> None:
    # scikit-learn takes a second to import and only the first call needs it
    from sklearn.datasets import load_digits

    scans, targets = load_digits(return_X_y=True)
    manifest = {}
    for number, (scan, target, split) in enumerate(zip(scans, targets, split_digits(targets), strict=True)):
        name = f"{split}/{target}/digit_{number:04d}.png"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.round(scan.reshape(8, 8) * (255 / _LARGEST_PIXEL)).astype(np.uint8)
        Image.fromarray(grey).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC).save(path)
        manifest[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_synced(folder / _MANIFEST, json.dumps(manifest, indent=0).encode())


def _verify(folder: Path) -> None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{folder} is not empty and holds no readable {_MANIFEST}, so it is not ours: choose another --out"
        ) from None
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise UserError(f"{path} is missing or was changed: delete {folder} and run this command again")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ssm_train.data.digits", description="Write the digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    out = parser.parse_args(argv).out

    def command() -> None:
        print(f"digits: {out} " + ("written" if write_digits(out) else "is complete"))

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
