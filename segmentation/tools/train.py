"""Train a segmentor: the stock flags, with data, weights and classes checked before the first step.

python segmentation/tools/train.py CONFIG --cfg-options model.backbone.checkpoint=FILE [--work-dir DIR] [--resume]
"""

import sys

from ssm_mm import arguments
from ssm_mm.packages import require
from ssm_train.common.command import run


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(lambda: train(argv))


def train(argv: list[str] | None) -> None:
    """Raises UserError."""
    require("mmsegmentation")
    from ssm_mm.training import run_training  # when mmengine has been found

    parser = arguments.train_parser("segmentation/tools/train.py", "Train a segmentor.")
    run_training(arguments.parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
