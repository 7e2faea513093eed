"""Curves of training runs: ours, or of Swin, VMamba, VSSD, DeiT, ConvNeXt, Vim, OpenMMLab, timm and others.

There is a panel for everything that at least one log has: loss, accuracy, AP, mIoU, learning rate, gradient norm,
throughput and waiting for data. Which forms of logs are read is in analyze/logs.

examples:
  python analyze/loss.py
  python analyze/loss.py --checkpoint runs/quickstart runs/vim --out curves.png
  python analyze/loss.py --log log_rank0.txt scalars.json ... --csv curves.csv

Beside FILE.png lie FILE.svg and FILE.pdf. The csv holds every number of every log.
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("loss.py", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        "--run",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="run folders of ours, which hold log.jsonl (without --log: runs/quickstart, else a nano model that is "
        "trained for 20 s)",
    )
    add("--log", type=Path, nargs="+", default=[], help="log files, ours or of others")
    add("--out", type=Path, metavar="FILE", help="PNG to write (curves.png in the first run, or in runs/analyze)")
    add("--csv", type=Path, help="also write all numbers to this file")
    return cli.start("loss", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
