"""Features of a data set's images: what enters a model's classifier. A killed run goes on where it stopped.

Writes OUT/SPLIT-00003-of-00012.safetensors with `features` (n, C) fp32, `targets` (n,) and `indices` (n,) int64, places
in the list of the split's images, and OUT/features.json, which says what they are of. Files appear when they are
complete; the same command again makes those that are missing, bit for bit as it would have (on the same device).
linear_probe.py reads them.

examples:
  python analyze/features.py
  python analyze/features.py --checkpoint runs/quickstart --out features/ --splits val
  python analyze/features.py --model vmamba_tiny_s1l8 --checkpoint OFFICIAL.pth --data-path IMAGENET --out features/
"""

import argparse
import sys

from analyze import cli

SPLITS = ("train", "val")


def parser() -> argparse.ArgumentParser:
    parser = cli.command_line("features.py", __doc__)
    add = parser.add_argument
    cli.add_model_arguments(parser)
    add("--data-path", metavar="FOLDER", help="holds train/<class>/* and val/<class>/* (the run's data)")
    add("--dataset", help="how DATA_PATH is laid out, as for classification/main.py (the run's, or folder)")
    add("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    add("--size", type=int, help="side of the images in pixels (the run's or the model's)")
    add("--batch-size", type=int, default=64, metavar="N", help="images at a time (%(default)s)")
    add("--shard", type=int, default=4096, metavar="N", help="images per file (%(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images (%(default)s)")
    cli.add_out_argument(parser, "features", "folder to write to, or to continue")
    cli.add_device_argument(parser)
    cli.add_range_argument(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return cli.start("features", parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
