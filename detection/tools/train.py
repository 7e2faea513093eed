"""Train a detector: the stock flags, with data, weights and classes checked before the first step.

python detection/tools/train.py CONFIG --cfg-options model.backbone.checkpoint=FILE [--work-dir DIR] [--resume [FILE]]
"""

import sys

from ssm_mm import command
from ssm_mm.packages import require


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return command.run(lambda: train(argv))


def train(argv: list[str] | None) -> None:
    """Raises UsageError."""
    require("mmdet")
    from ssm_mm.training import run_training  # when mmengine has been found

    parser = command.train_parser("detection/tools/train.py", "Train a detector.")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the global batch")
    run_training(command.parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
