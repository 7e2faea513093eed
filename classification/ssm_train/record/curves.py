"""The curves of a run, and their picture."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ssm_train.record.series import Entry, Summary, read_entries

# of Okabe and Ito, told apart by colour-blind readers and in grey
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DRAWN = {
    "train": ("loss", "lr", "grad_norm", "images_per_second", "data_wait"),
    "val": ("loss", "top1", "ema_loss", "ema_top1"),
}


class Series(NamedTuple):
    """A curve: `x` in epochs (1.5 is half-way through the second), `y` nan where the value was not finite."""

    x: list[float]
    y: list[float]


class Curves(NamedTuple):
    """The curves of a run, by kind of log entry and name of the value: "train/loss", "val/top1", ...;
    "epoch/train_loss" is the mean over every validated epoch, at its middle."""

    name: str
    series: dict[str, Series]


def curves(name: str, entries: Iterable[Entry]) -> Curves:
    """The curves of a log. Where an epoch or a part of it was repeated, the last time counts."""
    entries = list(entries)
    train = {(entry["epoch"], entry["iteration"]): entry for entry in entries if entry["kind"] == "train"}
    val = {entry["epoch"]: entry for entry in entries if entry["kind"] == "val"}
    last: dict[int, int] = {}
    for epoch, iteration in train:
        last[epoch] = max(iteration, last.get(epoch, 0))
    # an epoch that was not validated may be incomplete: it is as long as the longest
    steps = {epoch: last[epoch] if epoch in val else max(last.values()) for epoch in last}
    positioned = [("train", epoch - 1 + i / steps[epoch], train[epoch, i]) for epoch, i in sorted(train)]
    positioned += [("val", float(epoch), val[epoch]) for epoch in sorted(val)]
    series: dict[str, Series] = {}
    for kind, x, entry in positioned:
        for key in _DRAWN[kind]:
            if key in entry:
                _extend(series, f"{kind}/{key}", x, entry[key])
    for epoch, row in sorted(Summary(entries).rows.items()):
        _extend(series, "epoch/train_loss", epoch - 0.5, row["train_loss"])
    return Curves(name, series)


def _extend(series: dict[str, Series], key: str, x: float, y: float | None) -> None:
    points = series.setdefault(key, Series([], []))
    points.x.append(x)
    points.y.append(float("nan") if y is None else y)


def read_curves(folder: Path) -> Curves:
    """The curves of the run in `folder`. Raises FileNotFoundError, and ValueError where nothing is logged yet."""
    found = curves(folder.resolve().name, read_entries(folder / "log.jsonl"))
    if not found.series:
        raise ValueError(f"{folder / 'log.jsonl'} holds no entries yet")
    return found


def draw(run: Curves) -> Figure:
    """Loss, accuracy, learning rate, gradient norm and throughput over epochs."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, top1, rate), (norm, speed, wait) = figure.subplots(2, 3)
    # key, label, colour, style
    panels = {
        loss: [
            ("train/loss", "training", 2, {"alpha": 0.4, "linewidth": 0.8}),
            ("epoch/train_loss", "training, mean of epoch", 2, {"linestyle": ":"}),
            ("val/loss", "validation", 0, {}),
            ("val/ema_loss", "validation, EMA", 1, {"linestyle": "--"}),
        ],
        top1: [("val/top1", "model", 0, {}), ("val/ema_top1", "EMA", 1, {"linestyle": "--"})],
        rate: [("train/lr", "learning rate", 0, {})],
        norm: [("train/grad_norm", "before clipping", 0, {"linewidth": 0.8})],
        speed: [("train/images_per_second", "all processes", 0, {"linewidth": 0.8})],
        wait: [("train/data_wait", "mean of processes", 0, {"linewidth": 0.8})],
    }
    for axes, lines in panels.items():
        for key, label, color, style in lines:
            if key in run.series:
                _line(axes, run.series[key], label=label, color=COLORS[color], **style)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            # below the panel, where no curve can be
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    loss.set(title="loss", ylabel="loss (nats per image)")
    top1.set(title="validation accuracy", ylabel="top-1 (%)")
    rate.set(title="learning rate", ylabel="learning rate")
    norm.set(title="gradient", ylabel="L2 norm", yscale="log")
    speed.set(title="training throughput", ylabel="images/s")
    wait.set(title="waiting for data", ylabel="share of training time")
    wait.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (speed, wait):
        axes.set_ylim(bottom=0)
    return figure


def _line(axes: Axes, series: Series, **style: str | float) -> None:
    # a line through one or two points is hard to see or none
    axes.plot(series.x, series.y, marker="o" if len(series.x) < 30 else "", markersize=3, **style)


def save_curves(run: Curves, path: Path) -> None:
    """Draw `run` into the PNG `path`."""
    image = io.BytesIO()
    draw(run).savefig(image, format="png", dpi=120)
    path.write_bytes(image.getvalue())
