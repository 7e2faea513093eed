"""What the benchmarks write: a csv, and a picture of the same name."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_csv(rows: list[dict], columns: tuple[str, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def panels(count: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    """A figure of so many panels one below the other, `size` in inches."""
    from matplotlib.figure import Figure  # takes a second, and only pictures need it

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(count, 1, squeeze=False)[:, 0]


def legend_beside(axes: Axes) -> None:
    """To the right of the panel, where no curve can be."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def write_picture(figure: Figure, table: Path) -> None:
    """Beside the csv `table`, as PNG, SVG and PDF. The same picture gives the same bytes: no dates, no random names."""
    from matplotlib import rc_context

    figure.savefig(table.with_suffix(".png"), dpi=100)
    figure.set_layout_engine("none")  # all three in the same layout, which takes longest to find
    with rc_context({"svg.hashsalt": table.stem, "svg.fonttype": "none"}):
        figure.savefig(table.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(table.with_suffix(".pdf"), metadata={"CreationDate": None})
