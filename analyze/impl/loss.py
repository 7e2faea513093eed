"""Curves of training runs, from logs of many forms."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analyze.cli import OUT
from analyze.figures import check_png, colors_of, save_figure
from analyze.logs import Log, read_log
from analyze.quick import quick_run, say
from analyze.tables import write_csv
from ssm_train.common.errors import UserError
from ssm_train.record.curves import Curves, read_curves


class Panel(NamedTuple):
    """`lines`: what a curve is and its style, by the curve's name; y is multiplied by `unit`."""

    title: str
    label: str
    lines: dict[str, tuple[str, str]]
    scale: str = "linear"
    unit: float = 1.0


_TRAINING = ("training, steps", "-")
_PANELS = (
    Panel(
        "loss",
        "loss (as logged)",
        {
            "train/loss": ("training, steps", "-"),
            "epoch/train_loss": ("training, mean of epoch", ":"),
            "val/loss": ("validation", "-"),
            "val/ema_loss": ("validation, EMA", "--"),
        },
    ),
    Panel(
        "validation accuracy",
        "top-1 (%)",
        {
            "val/top1": ("validation", "-"),
            "val/ema_top1": ("validation, EMA", "--"),
            "val/accuracy/top1": ("validation", "-"),
        },
    ),
    Panel(
        "average precision",
        "AP (%)",
        {
            "val/coco/bbox_mAP": ("boxes", "-"),
            "val/coco/segm_mAP": ("masks", "--"),
            "val/bbox_mAP": ("boxes", "-"),
            "val/segm_mAP": ("masks", "--"),
        },
        unit=100.0,
    ),
    Panel("segmentation", "mIoU (%)", {"val/mIoU": ("validation", "-")}),
    Panel("learning rate", "learning rate", {"train/lr": _TRAINING}),
    Panel("gradient before clipping", "L2 norm", {"train/grad_norm": _TRAINING}, scale="log"),
    Panel("training throughput", "images/s", {"train/images_per_second": _TRAINING}),
    Panel("waiting for data", "share of training time (%)", {"train/data_wait": _TRAINING}, unit=100.0),
)
_NOISY = ("train/loss", "train/grad_norm", "train/images_per_second", "train/data_wait")
_FROM_ZERO = ("train/images_per_second", "train/data_wait")


def draw(logs: Sequence[Log]) -> Figure:
    """A colour per log; a panel for everything that at least one of them has. UserError where units differ, and where
    there is nothing to draw."""
    units = {log.unit: log.name for log in logs}
    if len(units) > 1:
        counts = ", ".join(f"{name} counts {unit}s" for unit, name in units.items())
        raise UserError(f"{counts}: draw them one by one")
    [unit] = units
    shown = [panel for panel in _PANELS if any(key in log.series for key in panel.lines for log in logs)]
    if not shown:
        known = ", ".join(sorted({key for log in logs for key in log.series}))
        panels = ", ".join(key for panel in _PANELS for key in panel.lines)
        raise UserError(f"{logs[0].name} holds none of the curves that are drawn ({panels}), but: {known}")
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.0 + 4.2 * columns, 1.2 + 3.4 * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    colors = colors_of(range(len(logs))).values()
    styles: dict[str, Line2D] = {}
    for number, panel in enumerate(shown):
        axes = figure.add_subplot(rows, columns, number + 1)
        for log, color in zip(logs, colors, strict=True):
            for key, (what, style) in panel.lines.items():
                if key in log.series:
                    line = _line(axes, log, key, panel.unit, label=f"{log.name} {what}", color=color, linestyle=style)
                    styles.setdefault(what, _in_grey(line, what))
        axes.set(title=panel.title, xlabel=unit, ylabel=panel.label, yscale=panel.scale)
        if any(key in _FROM_ZERO for key in panel.lines):
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(alpha=0.3)
    # below the panels, where no curve can be
    handles = [
        Line2D([], [], color=color, linewidth=4, label=log.name) for log, color in zip(logs, colors, strict=True)
    ]
    handles += styles.values() if len(styles) > 1 else []
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize="small")
    return figure


def _line(axes: Axes, log: Log, key: str, factor: float, **style: str) -> Line2D:
    series = log.series[key]
    [line] = axes.plot(
        series.x,
        [factor * y for y in series.y],
        marker="o" if len(series.x) < 30 else "",
        markersize=3,
        linewidth=0.8 if key in _NOISY else 1.5,
        alpha=0.6 if key in _NOISY else 1.0,
        **style,
    )
    return line


def _in_grey(line: Line2D, label: str) -> Line2D:
    """What stands for the style of a line in the legend."""
    look = {"linestyle": line.get_linestyle(), "linewidth": line.get_linewidth(), "marker": line.get_marker()}
    return Line2D([], [], color="grey", markersize=3, label=label, **look)


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


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    if not args.checkpoint and not args.log:
        args.checkpoint = [quick_run()]
        say(f"taking --checkpoint {args.checkpoint[0]}")
    runs = [_read_run(folder) for folder in args.checkpoint]
    logs = [Log(found.name, "epoch", found.series) for found in runs] + [read_log(path) for path in args.log]
    out = args.out or (args.checkpoint[0] if args.checkpoint else OUT) / "curves.png"
    check_png(out)
    save_figure(draw(logs), out)
    print(out)
    if args.csv:
        write_csv(args.csv, _COLUMNS, rows(logs))
        print(args.csv)
