"""Logs of MMEngine and of its predecessor MMCV: JSON lines, and text."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable

from analyze.logs.form import NUMBER, Form, Values, numbers, objects

# where, and how long it took
_BOOKKEEPING = {"epoch", "iter", "step", "eta", "time", "data_time"}


def _enter(values: Values, kind: str, x: float, results: Iterable[tuple[str, float]]) -> None:
    for key, value in results:
        if key not in _BOOKKEEPING:
            values[f"{kind}/{key}"][x] = value


def _scalars(text: str) -> tuple[str, Values]:
    """Training steps have "iter", from 1 over all epochs; validations have their results and, as "step", the epoch or
    the iteration. Without training they are tests, which are counted."""
    rows = list(map(numbers, objects(text)))
    train = [row for row in rows if "iter" in row]
    by_epoch = any("epoch" in row for row in train)
    # iterations of an epoch: the fewest with which every step lies in its own
    length = max((math.ceil(row["iter"] / row["epoch"]) for row in train if row.get("epoch")), default=1)
    values: Values = defaultdict(dict)
    for row in train:
        _enter(values, "train", row["iter"] / length if by_epoch else row["iter"], row.items())
    results = [row for row in rows if "step" in row and "iter" not in row]
    for number, row in enumerate(results, start=1):
        _enter(values, "val", row["step"] if train else number, row.items())
    return ("epoch" if by_epoch else "iteration") if train else "evaluation", values


_LINE = re.compile(r"\b(Epoch|Iter)(\(\w+\))?((?:\s*\[\s*\d+(?:/\d+)?\])+)(.*)")
_FIELD = re.compile(rf"([\w./-]+): ({NUMBER})(?=[\s,]|$)")


def _text(text: str) -> tuple[str, Values]:
    """Epochs and steps count from 1. Validation in a training of iterations comes after the step logged last. Without
    training there are tests, which are counted."""
    values: Values = defaultdict(dict)
    unit, reached, tests = "evaluation", 0.0, 0
    for line in text.splitlines():
        found = _LINE.search(line)
        if found is None:
            continue
        by, kind, place, rest = found.groups()
        *before, (step, steps) = re.findall(r"\[\s*(\d+)(?:/(\d+))?\]", place)
        fields = [(key, float(value)) for key, value in _FIELD.findall(rest)]
        # other lines of validation tell its progress: these have no results
        results = [(key, value) for key, value in fields if key != "memory" and key not in _BOOKKEEPING]
        if kind in (None, "(train)"):
            unit = "epoch" if by == "Epoch" else "iteration"
            reached = int(before[0][0]) - 1 + int(step) / int(steps) if before else float(step)
            _enter(values, "train", reached, fields)
        elif kind == "(val)":
            _enter(values, "val", float(before[0][0]) if before else reached, results)
        elif kind == "(test)" and results and unit == "evaluation":
            tests += 1
            _enter(values, "val", tests, results)
    return unit, values


SCALARS = Form("MMEngine's scalars.json", 'a JSON object per line, with "step"', r'^\{.*"step": \d', _scalars)
TEXT = Form("OpenMMLab's text", '"Epoch(train) [1][50/7330]" or "Iter(train) [50/160000]"', _LINE.pattern, _text)
