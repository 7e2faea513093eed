"""What the pictures of this folder have in common: colours, axes, and how they are written."""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from analyze.inputs import check_writable, make_folder
from ssm_train.common.errors import UserError
from ssm_train.record.curves import COLORS

VECTOR = (".svg", ".pdf")
"""Written beside every PNG."""

Key = TypeVar("Key", bound=Hashable)


def colors_of(keys: Iterable[Key]) -> dict[Key, str]:
    """A colour for each of `keys`, in their order."""
    return dict(zip(dict.fromkeys(keys), itertools.cycle(COLORS), strict=False))


def log_y_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: 1, 2, 5, 10, ..."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic x axis with the image sizes as its ticks."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("image size (pixels a side)")
    axes.grid(alpha=0.3, which="both")


def check_png(out: Path) -> None:
    """UserError for an --out that cannot be written, or is no .png: its name, with other endings, is that of the
    numbers and of the same picture beside it."""
    if out.suffix != ".png":
        raise UserError(f"--out {out} does not end in .png")
    for suffix in (".png", *VECTOR):
        check_writable(out.with_suffix(suffix))


def save_png(figure: Figure, out: Path) -> None:
    """Write the picture, in a folder that is made if need be. Its layout is kept for what is written after."""
    make_folder(out.parent)
    figure.savefig(out, dpi=150)
    figure.set_layout_engine("none")  # to find it takes longest


def save_figure(figure: Figure, out: Path) -> None:
    """Write the picture as PNG, SVG and PDF. The same picture gives the same bytes: no dates, no random names."""
    save_png(figure, out)
    with rc_context({"svg.hashsalt": out.stem, "svg.fonttype": "none"}):
        figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(out.with_suffix(".pdf"), metadata={"CreationDate": None})
