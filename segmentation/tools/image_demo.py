"""Colour images by the classes that a trained segmentor gives their pixels.

python segmentation/tools/image_demo.py IMAGE ... --config CONFIG --checkpoint FILE [--out-dir demo]
"""

import sys

from ssm_mm.packages import require
from ssm_train.common.command import run


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(lambda: demo(argv))


def demo(argv: list[str] | None) -> None:
    """Raises UserError."""
    require("mmsegmentation")
    from ssm_mm.demo import demo_parser, draw_predictions  # when mmengine has been found

    parser = demo_parser("segmentation/tools/image_demo.py", "classes")
    print(*draw_predictions(parser.parse_args(argv), with_labels=False), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
