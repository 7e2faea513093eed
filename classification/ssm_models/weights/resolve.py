"""What a user calls weights: a path, or a name of the table."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .download import fetch
from .table import Entry, find

_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


class Source(NamedTuple):
    """A file of weights."""

    path: Path
    which: str
    """The set to read, "model" or "ema"; "auto" where nobody said."""
    entry: Entry | None
    """Of the table; None for a user's own file."""


def resolve(weights: str | Path, which: str = "auto", cache_dir: str | Path | None = None) -> Source:
    """The file of `weights`: a path, or a name of the table, which is downloaded if need be. `which` overrules the
    table's entry.

    Raises:
        CheckpointError: it looks like no path and there is no such name, or the file cannot be had.
    """
    if is_path(weights):
        path = Path(weights)
        return Source(path, which, None)
    entry = find(str(weights))
    return Source(fetch(entry, cache_dir), entry.entry if which == "auto" else which, entry)


def is_path(weights: str | Path) -> bool:
    """Whether `weights` means a file or folder: it is there, or looks like one. Otherwise it is a name of the table."""
    weights = str(weights)
    return "/" in weights or "\\" in weights or weights.endswith(_SUFFIXES) or Path(weights).exists()
