"""Logs of Swin's trainer and those made of it, VMamba's and VSSD's among them."""

import re
from collections import defaultdict
from collections.abc import Iterator

from analyze.logs.evaluations import Evaluation, read_evaluations
from analyze.logs.form import NUMBER, Form, Values

_STEP = re.compile(r"Train: \[(\d+)/\d+\]\[(\d+)/(\d+)\]\s*(.*)")
_FIELD = re.compile(rf"(loss|lr|grad_norm|mem) ({NUMBER})(?: \(({NUMBER})\))?")
# a start of the trainer, which tries a checkpoint again before its training goes on
_START = "Creating model"


def _parse(text: str) -> tuple[str, Values]:
    """Epochs and steps count from 0. The evaluations after the steps of an epoch are its own."""
    values: Values = defaultdict(dict)
    averaged = any(each.weights == "ema" for each in read_evaluations(text.splitlines()))
    epoch: int | None = None
    for is_step, lines in _blocks(text.splitlines()):
        if is_step:
            [line] = lines
            step = _STEP.search(line)
            epoch, iteration, steps = map(int, step.groups()[:3])
            _enter_step(values, epoch, epoch + (iteration + 1) / steps, step[4])
        elif epoch is not None:
            for weights, result in _attributed(read_evaluations(lines), averaged):
                prefix = "ema_" if weights == "ema" else ""
                for key, value in result.numbers.items():
                    points = values[f"val/{prefix}{key}"]
                    if result.rated or epoch + 1 not in points:
                        points[epoch + 1] = value
    return "epoch", values


def _blocks(lines: list[str]) -> Iterator[tuple[bool, list[str]]]:
    """(True, [line of a step]) and (False, lines between steps and starts)."""
    between: list[str] = []
    for line in lines:
        is_step = _STEP.search(line) is not None
        if is_step or _START in line:
            yield False, between
            between = []
        if is_step:
            yield True, [line]
        else:
            between.append(line)
    yield False, between


def _enter_step(values: Values, epoch: int, x: float, fields: str) -> None:
    for key, value, mean in _FIELD.findall(fields):
        name = {"mem": "memory_mb"}.get(key, key)
        values[f"train/{name}"][x] = float(value)
        if key == "loss" and mean:
            values["epoch/train_loss"][epoch + 0.5] = float(mean)


def _attributed(found: list[Evaluation], averaged: bool) -> Iterator[tuple[str, Evaluation]]:
    """The evaluations of one epoch with the weights that they are of: "model" or, where there is an average, "ema".

    VMamba says "Max accuracy" or "Max accuracy ema" after each. VSSD says so of records only: of those that it leaves
    unsaid, the first is the model's, the second the average's.
    """
    seen: set[str] = set()
    for each in found:
        weights = each.weights or ("ema" if averaged and "model" in seen else "model")
        if each.weights or weights not in seen:
            yield weights, each
        seen.add(weights)


FORM = Form("Swin, VMamba or VSSD", '"Train: [0/300][0/1251]"', _STEP.pattern, _parse)
