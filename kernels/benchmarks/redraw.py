"""Draws the pictures of tables again, without measuring anything: python kernels/benchmarks/redraw.py TABLE.csv ...

Every table is drawn by the benchmark that writes such tables, and its PNG, SVG and PDF are written beside it.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import cpu_models
import models
import roofline
import run
import runtimes
import static_plot

DRAWING = {"impl": run, "layout": models, "baseline": cpu_models, "runtime": runtimes, "predicted_us": static_plot}
DRAWING |= {"share_of_products": roofline}
"""By the column that only its tables have."""


def read(table: Path) -> list[dict]:
    """The rows of a csv with the types that they were written from."""
    with open(table, newline="") as file:
        return [{name: _typed(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _typed(cell: str) -> object:
    if cell in ("True", "False"):
        return cell == "True"
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def redraw(table: Path) -> None:
    """Raises SystemExit for a table of no benchmark."""
    rows = read(table)
    drawing = next((script for column, script in DRAWING.items() if column in rows[0]), None)
    if drawing is None:
        raise SystemExit(f"{table} has none of the columns {', '.join(DRAWING)}: it is of no benchmark")
    drawing.draw(rows, table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", type=Path)
    for table in parser.parse_args(argv).tables:
        redraw(table)


if __name__ == "__main__":
    main()
