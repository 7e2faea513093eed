"""Curves of one or more training runs, from their log.jsonl: loss, accuracy, learning rate, gradient, throughput.

python analyze/loss.py --run runs/quickstart [MORE RUNS] [--out curves.png]
"""

import argparse
import sys
from pathlib import Path

from classification.report import read_curves, save_curves


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/loss.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="run folders, which hold log.jsonl")
    parser.add_argument("--out", type=Path, help="PNG to write (curves.png in the first run folder)")
    args = parser.parse_args(argv)
    out = args.out or args.run[0] / "curves.png"
    try:
        runs = [read_curves(folder) for folder in args.run]
    except FileNotFoundError as error:
        print(f"error: {error.filename} does not exist; give the folder of a training run", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    save_curves(runs, out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
