"""How good features are: a linear classifier and k nearest neighbours on them.

Classifiers are fitted to the features of train and judged on those of val, as features.py wrote them. The linear one is
a multinomial logistic regression on standardised features; neighbours are those of the largest cosine similarity s,
each with the weight exp(s / temperature).

examples:
  python analyze/linear_probe.py
  python analyze/linear_probe.py --features features/ --solver sgd --l2 1e-5 --k 1 20 200 --out probe.png

Beside FILE.png lie FILE.svg, FILE.pdf and FILE.json with the accuracies.
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("linear_probe.py", __doc__)
    add = parser.add_argument
    add(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="of features.py (runs/analyze/features, made if need be)",
    )
    add("--solver", choices=("lbfgs", "sgd"), default="lbfgs", help="sgd for what memory cannot hold twice (lbfgs)")
    add("--l2", type=float, default=1e-4, help="weight of |W|^2 / 2 (%(default)g)")
    add("--epochs", type=int, default=100, help="of sgd; iterations of lbfgs (%(default)s)")
    add("--k", type=int, nargs="+", default=[1, 5, 10, 20, 50, 100], help="neighbours (%(default)s)")
    add("--temperature", type=float, default=0.07, help="of the neighbours' weights (%(default)g)")
    add("--out", type=Path, metavar="FILE", help="PNG to write (probe.png beside the features)")
    cli.add_device_argument(parser)
    return cli.start("linear_probe", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
