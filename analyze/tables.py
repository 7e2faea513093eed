"""Tables of this folder: csv files and aligned columns of text."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from analyze.inputs import make_folder


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """The cells of `rows` below the names of their columns; None is left blank. The folder is made if need be."""
    make_folder(path.parent)
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of text with columns of one width, the first `left` of them flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return ["  ".join(put(cell, width) for put, cell, width in zip(flush, row, widths, strict=True)) for row in rows]
