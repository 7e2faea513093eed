"""Parameters and multiply-accumulates of a detector, by part, as the papers' tables count them.

python detection/tools/get_flops.py CONFIG [--shape 1280 800]
"""

import argparse
import sys

from ssm_mm.packages import require
from ssm_train.common.command import run


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(lambda: get_flops(argv))


def get_flops(argv: list[str] | None) -> None:
    """Raises UserError."""
    require("mmdet")
    from ssm_mm.config import read_config  # when mmengine has been found
    from ssm_mm.flops import dense_card

    parser = argparse.ArgumentParser(prog="detection/tools/get_flops.py", description="Count a detector.")
    parser.add_argument("config", help="a file of configs/, or any config of a two-stage detector")
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(1280, 800), metavar=("WIDTH", "HEIGHT"), help="pixels (1280 800)"
    )
    args = parser.parse_args(argv)
    width, height = args.shape
    print(dense_card(read_config(args.config), (height, width)))


if __name__ == "__main__":
    sys.exit(main())
