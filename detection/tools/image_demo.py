"""Draw the boxes and masks that a trained detector finds over images.

python detection/tools/image_demo.py IMAGE ... --config CONFIG --checkpoint FILE [--score 0.5] [--out-dir demo]
"""

import sys

from ssm_mm.packages import require
from ssm_train.common.command import run


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(lambda: demo(argv))


def demo(argv: list[str] | None) -> None:
    """Raises UserError."""
    require("mmdet")
    from ssm_mm.demo import demo_parser, draw_predictions  # when mmengine has been found

    parser = demo_parser("detection/tools/image_demo.py", "boxes and masks")
    parser.add_argument("--score", type=float, default=0.5, help="least score of what is drawn (0.5)")
    args = parser.parse_args(argv)
    print(*draw_predictions(args, pred_score_thr=args.score), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
