"""The authors' published weights: a table of files, and what brings a name of it to a checked file on this machine."""

from .download import fetch
from .resolve import Source, is_path, resolve
from .table import Entry, entries, find

__all__ = ["Entry", "Source", "entries", "fetch", "find", "is_path", "resolve"]
