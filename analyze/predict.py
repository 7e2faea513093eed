"""What a model says of images: the most probable classes, as a picture sheet and a table.

Images are prepared as in the evaluation of the run or, for other weights, of the model's authors. Files that cannot be
read are named, a line each on stderr, and left out; the exit status is then 1, or 2 where none can be read.

examples:
  python analyze/predict.py
  python analyze/predict.py --checkpoint runs/quickstart --images FILE_OR_FOLDER ... --top 3
  python analyze/predict.py --model vmamba_tiny_s1l8 --checkpoint OFFICIAL.pth --images photo.jpg --classes NAMES.txt

Beside FILE.png lie FILE.svg, FILE.pdf and FILE.csv with all predictions.
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("predict.py", __doc__)
    add = parser.add_argument
    cli.add_model_arguments(parser)
    cli.add_images_argument(parser, default="24 digits, or two photographs")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one per line")
    add("--top", type=int, default=5, help="classes to name (%(default)s)")
    add("--size", type=int, help="side of the images in pixels (the run's or the model's)")
    cli.add_out_argument(parser, "predict.png", "PNG to write, with the first 48 images")
    cli.add_device_argument(parser)
    cli.add_range_argument(parser)
    return cli.start("predict", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
