"""Loss and accuracy curves of one or more training runs, from their log.jsonl.

python analyze/loss.py --run runs/quickstart [MORE RUNS] [--out curves.png]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Entry = dict[str, float | int | str | None]


class Curves(NamedTuple):
    """A run's log: `train` by position in epochs (1.5 is half-way through the second), `val` by finished epochs."""

    name: str
    train: dict[float, Entry]
    val: dict[float, Entry]


def read_curves(folder: Path) -> Curves:
    """Read folder/log.jsonl. What an interrupted attempt logged gives way to the entries of the run that repeated it.

    Raises FileNotFoundError, and ValueError when the file holds no entries.
    """
    entries = [entry for line in (folder / "log.jsonl").read_text().splitlines() if (entry := _parse(line)) is not None]
    if not entries:
        raise ValueError(f"{folder / 'log.jsonl'} holds no entries yet")
    train = {(entry["epoch"], entry["iteration"]): entry for entry in entries if entry["kind"] == "train"}
    val = {float(entry["epoch"]): entry for entry in entries if entry["kind"] == "val"}
    longest = max((iteration for _, iteration in train), default=1)
    by_position = {epoch - 1 + iteration / longest: train[epoch, iteration] for epoch, iteration in sorted(train)}
    return Curves(folder.name, by_position, dict(sorted(val.items())))


def _parse(line: str) -> Entry | None:
    """One entry; None for a line that a killed process left unfinished."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def draw(runs: list[Curves]) -> Figure:
    """Loss (training and validation) on the left, validation accuracy on the right."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        color = f"C{number}"
        label = "" if len(runs) == 1 else f"{run.name}: "
        _line(losses, run.train, "loss", f"{label}training", color=color, alpha=0.35, linewidth=1)
        _line(losses, run.val, "loss", f"{label}validation", color=color)
        _line(losses, run.val, "ema_loss", f"{label}validation, EMA", color=color, linestyle="--")
        _line(accuracies, run.val, "top1", f"{label}model", color=color)
        _line(accuracies, run.val, "ema_top1", f"{label}EMA", color=color, linestyle="--")
    losses.set(xlabel="epoch", ylabel="cross-entropy", title="loss")
    accuracies.set(xlabel="epoch", ylabel="top-1, %", title="validation accuracy")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _line(axes: Axes, entries: dict[float, Entry], key: str, label: str, **style: str | float) -> None:
    points = [(position, entry[key]) for position, entry in entries.items() if entry.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/loss.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="run folders, which hold log.jsonl")
    parser.add_argument("--out", type=Path, help="PNG to write (curves.png in the first run folder)")
    args = parser.parse_args(argv)
    try:
        figure = draw([read_curves(folder) for folder in args.run])
    except FileNotFoundError as error:
        print(f"error: {error.filename} does not exist; give the folder of a training run", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = args.out or args.run[0] / "curves.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
