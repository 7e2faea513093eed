"""Every published result, and the command that gives it: evaluation with the authors' weights, or training.

bash modelcard.sh --list                                    names, published numbers, and whose weights there are
bash modelcard.sh NAME [test] [--data-path DIR]             evaluate: published and measured side by side
bash modelcard.sh NAME tta                                  the same with test-time augmentation (segmentation)
bash modelcard.sh NAME train                                train; detectors and segmentors from a classifier's weights
bash modelcard.sh [NAME [ACTION]] --dry-run                 print the command and do nothing; without NAME, all

NAME is that of a config or of published weights; other options go to the tool. Weights are downloaded, unless CKPT
names a file. GPUS is the number of processes: as many as there are GPUs, or one. Images: --data-path (data/imagenet)
for classification; data/coco and data/ade/ADEChallengeData2016, or --data-root DIR, else. The exit status is 1 where a
result lies further from the published one than --tolerance.

Classifiers are evaluated as published: 224 x 224 pixels, the centre of 256, bicubic.
"""

import argparse
import sys
from pathlib import Path

from analyze import cli

ACTIONS = ("test", "tta", "train")
# published numbers have one digit, and decoders and interpolation differ in the last bits of a pixel
_TOLERANCE = 0.2


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="modelcard.sh", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("action", nargs="?", metavar="ACTION", choices=ACTIONS, default="test", help="(test)")
    parser.add_argument("--list", action="store_true", help="the published results")
    parser.add_argument("--dry-run", action="store_true", help="print the command")
    parser.add_argument("--data-path", type=Path, help="images of classification (DATA_PATH, or data/imagenet)")
    parser.add_argument("--tolerance", type=float, default=_TOLERANCE, help="percent (%(default)g)")
    args, args.options = parser.parse_known_args(argv)
    return cli.start("modelcard", args)


if __name__ == "__main__":
    sys.exit(main())
