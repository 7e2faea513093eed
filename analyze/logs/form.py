"""What all forms of logs have."""

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"

Values = dict[str, dict[float, float]]
"""Name of a curve -> x -> y. Where something was done again, the last time counts."""


class Form(NamedTuple):
    name: str
    looked_for: str
    """What `mark` finds, in words."""
    mark: str
    """Regular expression of a line that no form after this one has."""
    parse: Callable[[str], tuple[str, Values]]
    """Text -> unit of all x, values. ValueError for what contradicts itself."""


def objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of the lines that are whole; a killed process leaves one that is not."""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Those of the values that are some."""
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def rows(text: str) -> Iterator[dict[str, float]]:
    """The numbers of every row of a csv file, by its header; empty cells and other text are left out."""
    for row in csv.DictReader(text.splitlines()):
        found = {}
        for key, value in row.items():
            try:
                found[key] = float(value)
            except (TypeError, ValueError):  # a row that is shorter than its header, or a header again
                continue
        yield found
