"""Parameters and multiply-accumulates (MACs, the "FLOPs" of the papers) of models, beside the published numbers.

Models are counted without memory or computation, by PyTorch's FlopCounterMode; --counter fvcore runs them and asks
fvcore, the counter of the papers, with the handles of `ssm_models.fvcore_handles` for our operators.
--tree DEPTH adds a line for every module down to that depth that costs anything; "(itself)" is what a module computes
outside of its parts, such as the scan of a mixer.

examples:
  python analyze/flops.py
  python analyze/flops.py --model vmamba_tiny_s1l8 vssd_tiny --size 512 640 --counter fvcore
  python analyze/flops.py --model vmamba_tiny_s1l8 --tree 2 --out tree.csv
"""

import sys
from pathlib import Path

from analyze import cli

LEGEND = """\
GMACs: 1e9 multiply-accumulates for one image, by the conventions of the papers' counter (fvcore).
hardware-aware, recurrence: everything, with scans counted as a prefix scan or as the plain recurrence.
official: what the family's own counter gives; published: the number its authors give, at 224x224. They may differ by up
to 3e-5, for that counter rounds some products to four digits."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("flops.py", __doc__)
    add = parser.add_argument
    add("--model", "--models", nargs="+", metavar="NAME", help="registered names (all)")
    add("--size", type=int, nargs="+", metavar="H [W]", help="of the images (each model's own)")
    add("--tree", type=int, nargs="?", const=2, metavar="DEPTH", help="module by module (to depth 2)")
    add("--counter", choices=("pytorch", "fvcore"), default="pytorch", help="who counts the MACs (%(default)s)")
    add("--out", "--csv", type=Path, default=cli.OUT / "flops.csv", help="exact numbers (%(default)s)")
    return cli.start("flops", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
