"""A sheet of validation images with the predicted and the true class; wrong predictions are framed in red.

examples:
  python analyze/predictions.py
  python analyze/predictions.py --checkpoint runs/quickstart --num 96 --data-path OTHER_DATA --out sheet.png

Beside FILE.png lie FILE.svg and FILE.pdf.
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("predictions.py", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        "--run",
        type=Path,
        metavar="RUN",
        help="a finished training run; its best weights are used (runs/quickstart, else a nano model that is trained "
        "for 20 s)",
    )
    add("--data-path", metavar="FOLDER", help="holds val/<class>/* (what the run was trained on)")
    add("--num", "--count", type=int, default=48, help="number of images (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="PNG to write (predictions.png in the run folder)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="(%(default)s)")
    return cli.start("predictions", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
