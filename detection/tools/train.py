"""Train a detector: the stock flags, with data, weights and classes checked before the first step.

python detection/tools/train.py CONFIG --cfg-options model.backbone.checkpoint=FILE [--work-dir DIR] [--resume [FILE]]
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
    require("mmdet")
    from ssm_mm.training import run_training  # when mmengine has been found

    parser = arguments.train_parser("detection/tools/train.py", "Train a detector.")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the global batch")
    run_training(arguments.parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
