"""The picture of analyze/tp.py: throughput and peak memory over the size of the images."""

import itertools
import statistics
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyze.figures import colors_of, log_y_axis, size_axis
from analyze.throughput import Result

_STYLES = {"eager": {"linestyle": "-", "marker": "o"}, "compiled": {"linestyle": "--", "marker": "s"}}


def draw(results: Sequence[Result], device: str) -> Figure:
    """A row per mode and precision: images/s and peak memory over the image size. Colours tell models, dashes and
    squares what is compiled; a cross at the foot stands for a variant that has no number."""
    kinds = list(dict.fromkeys((result.variant.mode, result.variant.precision) for result in results))
    figure = Figure(figsize=(11, 0.8 + 3.6 * len(kinds)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05, hspace=0.05)
    grid = figure.subplots(len(kinds), 2, squeeze=False)
    colors = colors_of(result.variant.model for result in results)
    for (speed, memory), kind in zip(grid, kinds, strict=True):
        mine = [result for result in results if (result.variant.mode, result.variant.precision) == kind]
        for (model, color), compiled in itertools.product(colors.items(), (False, True)):
            line = [r for r in mine if (r.variant.model, r.variant.compiled) == (model, compiled)]
            style = {"color": color, **_STYLES["compiled" if compiled else "eager"]}
            _curves(speed, memory, sorted(line, key=lambda result: result.variant.size), style)
        speed.set(title=f"{', '.join(kind)}: throughput ({device})", ylabel="images/s")
        memory.set(title=f"{', '.join(kind)}: peak memory, batch {mine[0].variant.batch}", ylabel="MiB")
        for axes in (speed, memory):
            size_axis(axes, sorted({result.variant.size for result in results}))
            log_y_axis(axes)
    handles = _legend(results, colors)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize="small")
    return figure


def _curves(speed: Axes, memory: Axes, line: Sequence[Result], style: dict[str, str]) -> None:
    ok = [result for result in line if result.images_per_second is not None]
    sizes = [result.variant.size for result in ok]
    middle = [statistics.median(result.samples) for result in ok]
    below = [m - min(result.samples) for m, result in zip(middle, ok, strict=True)]
    above = [max(result.samples) - m for m, result in zip(middle, ok, strict=True)]
    if ok:
        speed.errorbar(sizes, middle, yerr=(below, above), capsize=2, markersize=4, linewidth=1.3, **style)
        memory.plot(sizes, [result.peak_mib for result in ok], markersize=4, linewidth=1.3, **style)
    for result in line:
        if result.images_per_second is None:
            for axes in (speed, memory):
                foot = axes.get_xaxis_transform()  # x in data, y as share of the height
                axes.plot(result.variant.size, 0.03, "x", color=style["color"], markersize=8, transform=foot)


def _legend(results: Iterable[Result], colors: dict[str, str]) -> list[Line2D]:
    variants = [result.variant for result in results]
    handles = [Line2D([], [], color=color, label=model) for model, color in colors.items()]
    if any(variant.compiled for variant in variants):
        handles += [Line2D([], [], color="grey", label=name, **style) for name, style in _STYLES.items()]
    if any(result.status not in ("ok", "waiting", "running") for result in results):
        handles.append(Line2D([], [], color="grey", marker="x", ls="", label="out of memory or failed"))
    return handles
