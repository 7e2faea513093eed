"""Curves of training runs: ours, or of Swin, VMamba, VSSD, DeiT, ConvNeXt, Vim, OpenMMLab, timm and others.

python analyze/loss.py --run runs/quickstart [MORE RUNS] [--out curves.png]
python analyze/loss.py --log log_rank0.txt scalars.json ... [--run RUNS] [--out curves.png] [--csv curves.csv]

With --run alone: loss, accuracy, learning rate, gradient norm, throughput and waiting of our runs. With --log: what the
logs have in common with them, a panel each for loss, top-1, learning rate, AP and mIoU where they occur. Forms of logs
are in analyze/logs. The csv holds every number of every log.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analyze.figures import check_png, colors_of, save_figure
from analyze.logs import Log, read_log
from analyze.tables import write_csv
from ssm_train.common.command import run
from ssm_train.common.errors import UserError
from ssm_train.record import curves
from ssm_train.record.curves import Curves, read_curves

# title, label of the y axis, its scale, {curve: (what it is, line style, unit)}; y is multiplied by the unit
_PANELS = (
    (
        "training loss",
        "loss (as logged)",
        "linear",
        {"train/loss": ("steps", "-", 1.0), "epoch/train_loss": ("mean of epoch", ":", 1.0)},
    ),
    (
        "validation accuracy",
        "top-1 (%)",
        "linear",
        {
            "val/top1": ("model", "-", 1.0),
            "val/ema_top1": ("EMA", "--", 1.0),
            "val/accuracy/top1": ("model", "-", 1.0),
        },
    ),
    (
        "average precision",
        "AP (%)",
        "linear",
        {
            "val/coco/bbox_mAP": ("boxes", "-", 100.0),
            "val/coco/segm_mAP": ("masks", "--", 100.0),
            "val/bbox_mAP": ("boxes", "-", 100.0),
            "val/segm_mAP": ("masks", "--", 100.0),
        },
    ),
    ("segmentation", "mIoU (%)", "linear", {"val/mIoU": ("mIoU", "-", 1.0)}),
    ("learning rate", "learning rate", "linear", {"train/lr": ("", "-", 1.0)}),
    ("gradient", "L2 norm", "log", {"train/grad_norm": ("", "-", 1.0)}),
)


def draw(logs: Sequence[Log]) -> Figure:
    """A colour per log; a panel for everything that at least one of them has. UserError where units differ, and where
    there is nothing to draw."""
    units = {log.unit: log.name for log in logs}
    if len(units) > 1:
        counts = ", ".join(f"{name} counts {unit}s" for unit, name in units.items())
        raise UserError(f"{counts}: draw them one by one")
    [unit] = units
    shown = [panel for panel in _PANELS if any(key in log.series for key in panel[3] for log in logs)]
    if not shown:
        known = ", ".join(sorted({key for log in logs for key in log.series}))
        panels = ", ".join(key for panel in _PANELS for key in panel[3])
        raise UserError(f"{logs[0].name} holds none of the curves that are drawn ({panels}), but: {known}")
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.0 + 4.2 * columns, 1.0 + 3.4 * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    colors = colors_of(range(len(logs))).values()
    for number, (title, label, scale, lines) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, number + 1)
        styles: dict[str, str] = {}
        for log, color in zip(logs, colors, strict=True):
            for key, (what, style, factor) in lines.items():
                if key in log.series:
                    styles[what] = style
                    _line(axes, log, key, factor, label=f"{log.name} {what}", color=color, linestyle=style)
        axes.set(title=title, xlabel=unit, ylabel=label, yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(alpha=0.3)
        if len(styles) > 1:
            handles = [Line2D([], [], color="grey", linestyle=style, label=what) for what, style in styles.items()]
            axes.legend(handles=handles, fontsize="small")
    handles = [Line2D([], [], color=color, label=log.name) for log, color in zip(logs, colors, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(logs)), fontsize="small")
    return figure


def _line(axes: Axes, log: Log, key: str, factor: float, **style: str) -> None:
    series = log.series[key]
    noisy = key in ("train/loss", "train/grad_norm")
    axes.plot(
        series.x,
        [factor * y for y in series.y],
        marker="o" if len(series.x) < 30 else "",
        markersize=3,
        linewidth=0.8 if noisy else 1.5,
        alpha=0.6 if noisy else 1.0,
        **style,
    )


_COLUMNS = ("log", "curve", "unit", "x", "y")


def rows(logs: Sequence[Log]) -> Iterable[tuple[object, ...]]:
    """The cells of _COLUMNS, a line per number; y is empty where it was not finite."""
    for log in logs:
        for key, series in log.series.items():
            for x, y in zip(series.x, series.y, strict=True):
                yield log.name, key, log.unit, x, "" if y != y else y


def _read_run(folder: Path) -> Curves:
    try:
        return read_curves(folder)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist; give the folder of a training run") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/loss.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="run folders of ours, which hold log.jsonl")
    parser.add_argument("--log", type=Path, nargs="+", default=[], help="log files, ours or of others")
    parser.add_argument("--out", type=Path, help="PNG to write (curves.png in the first run folder, or here)")
    parser.add_argument("--csv", type=Path, help="also write all numbers to this file")
    args = parser.parse_args(argv)
    if not args.run and not args.log:
        parser.error("give --run FOLDER or --log FILE")

    def command() -> None:
        runs = [_read_run(folder) for folder in args.run]
        logs = [Log(found.name, "epoch", found.series) for found in runs] + [read_log(path) for path in args.log]
        out = args.out or (args.run[0] / "curves.png" if args.run else Path("curves.png"))
        check_png(out)
        save_figure(draw(logs) if args.log else curves.draw(runs), out)
        print(out)
        if args.csv:
            write_csv(args.csv, _COLUMNS, rows(logs))
            print(args.csv)

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
