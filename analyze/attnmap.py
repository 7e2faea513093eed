"""Where a token looks: the weights of VMamba's, Vim's or VSSD's mixer for one query, as maps over the image.

modes:
  CB       C of the query times B of a token: how alike they are, as Q K in attention
  CBdt     the same times dt, the token's step size: how strongly the token enters the state
  CwBw     CB times w: w is the share of the token that the state still holds when the query reads it
  CwBdtw   CB times dt times w: all that the token contributes, the derivative of the mixer's sum by the token
  ww       w alone
  softmax  the one mode of blocks of softmax attention: its probabilities

routes:
  a0, a1, ...  those of the mixer: of VMamba rows, columns, and both backwards; of Vim forwards and backwards;
               of VSSD all tokens at once
  all          their sum
  nall         the mean of the routes after each is stretched to 0..1

examples:
  python analyze/attnmap.py
  python analyze/attnmap.py --checkpoint runs/quickstart --images photo.jpg --query 120 80 --stage 1 --mode CwBdtw,ww
  python analyze/attnmap.py --model vmamba_tiny_s1l8 --checkpoint OFFICIAL.pth --size 512 --routes all

Beside FILE.png lie FILE.svg, FILE.pdf and FILE.npz, which holds the maps as MODE_ROUTE, the query in pixels, and its
row and column in the maps.
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("attnmap.py", __doc__)
    cli.add_model_arguments(parser)
    parser.add_argument(
        "--images", "--image", type=Path, nargs=1, metavar="FILE", help="any image (a digit, or a photograph)"
    )
    parser.add_argument("--query", type=int, nargs=2, metavar=("X", "Y"), help="pixel of the image (its middle)")
    parser.add_argument("--stage", type=int, default=0, help="from 0; Vim has one (%(default)s)")
    parser.add_argument("--block", type=int, help="of the stage, from 0 (the last)")
    parser.add_argument("--mode", type=cli.comma_list, metavar="M,...", help="see below (all)")
    parser.add_argument("--routes", type=cli.comma_list, metavar="R,...", help="see below (all)")
    parser.add_argument("--size", type=int, help="pixels of the image's shorter side (the run's or the model's)")
    cli.add_out_argument(parser, "attnmap.png", "PNG to write")
    cli.add_device_argument(parser)
    cli.add_range_argument(parser)
    return cli.start("attnmap", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
