"""What commands take where nothing is given: the run of quickstart.sh, else a nano model trained for 20 s and kept; and
images that come with the packages: scikit-learn's digits."""

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from analyze.cli import OUT
from ssm_train.common.errors import UserError
from ssm_train.data.digits import write_digits

QUICKSTART = Path("runs/quickstart")
DIGITS = Path("runs/data/digits")  # where quickstart.sh has them, too
NANO = OUT / "nano"

_ROOT = Path(__file__).parents[1]
CONFIG = _ROOT / "configs" / "classification" / "vmamba" / "vmamba_nano_digits.yaml"
_EPOCHS = 6


def say(text: str) -> None:
    """What was taken in place of what was not given, on stderr."""
    print(text, file=sys.stderr)


def digits() -> Path:
    """The folder of the digits, written if it is not there: train/<0-9>/*.png and val/<0-9>/*.png, 32x32, grey."""
    write_digits(DIGITS)
    return DIGITS


def digit_images(count: int) -> list[Path]:
    """`count` of the 355 validation digits, evenly spread over the classes."""
    paths = sorted((digits() / "val").rglob("*.png"))
    return [paths[number * len(paths) // count] for number in range(count)]


def quick_run() -> Path:
    """The folder of a finished training run on the digits. Raises UserError where it cannot be trained."""
    for run in (QUICKSTART, NANO):
        if (run / "metrics.json").is_file():
            return run
    say(f"no run in {QUICKSTART}: training a nano model on the digits (about 20 s), kept in {NANO}")
    train(NANO)
    return NANO


def train(folder: Path, epochs: int = _EPOCHS) -> None:
    """A short training of vmamba_nano on the digits. Raises UserError."""
    command = [sys.executable, str(_ROOT / "classification" / "main.py"), "--cfg", str(CONFIG), "--fresh"]
    command += ["--data-path", str(digits()), "--output", str(folder), "--opts", "TRAIN.EPOCHS", str(epochs)]
    with Console(stderr=True).status("training"):  # nothing where that is no terminal
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UserError(f"training of {folder} ended with {done.returncode}: {' '.join(last)}; or give --checkpoint")


def take_quick_run(args: argparse.Namespace, images: int) -> None:
    """Without --model and --checkpoint: the quick run as --checkpoint, and `images` digits as --images where these are
    missing too. It says so."""
    if args.model is not None or args.checkpoint is not None:
        return
    args.checkpoint = quick_run()
    taken = f"--checkpoint {args.checkpoint}"
    if not args.images:
        args.images = digit_images(images)
        taken += f" --images {args.images[0]}" + (f" and {images - 1} more" if images > 1 else "")
    say(f"taking {taken}")
