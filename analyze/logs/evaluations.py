"""Evaluations in the text of Swin's, VMamba's, VSSD's and DeiT's trainers; and of several sizes of images, as VMamba's
analyze/scaleup.py prints them."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from analyze.logs.form import NUMBER, Form, Values

_ACCURACY = re.compile(rf"\* Acc@1 ({NUMBER}) Acc@5 ({NUMBER})(?: loss ({NUMBER}))?")
_ROUNDED = re.compile(rf"Accuracy of the network( ema)? .*?test images: ({NUMBER})%")
_RECORD = re.compile(r"Max accuracy( ema)?: ", re.IGNORECASE)
_SIZE = re.compile(r"starting loop: img_size (\d+)")


@dataclass
class Evaluation:
    """Accuracies of one pass over the validation images."""

    numbers: dict[str, float]
    """ "top1" and, where they are told, "top5" and "loss" """
    weights: str = ""
    """ "model" or "ema", where the log tells"""
    rated: bool = False
    """Whether the log compares it with those of other epochs; a checkpoint that is tried again is not."""
    rounded: bool = False
    """Whether the line that repeats the accuracy, rounded, has come."""


def read_evaluations(lines: Iterable[str]) -> list[Evaluation]:
    """All in order: of each a line of exact accuracies, one of a rounded accuracy, or both."""
    found: list[Evaluation] = []
    for line in lines:
        if accuracy := _ACCURACY.search(line):
            named = zip(("top1", "top5", "loss"), accuracy.groups(), strict=True)
            found.append(Evaluation({key: float(value) for key, value in named if value is not None}))
        elif rounded := _ROUNDED.search(line):
            if not found or found[-1].rounded:
                found.append(Evaluation({"top1": float(rounded[2])}))
            found[-1].rounded = True
            found[-1].weights = "ema" if rounded[1] else found[-1].weights
        elif found and (record := _RECORD.search(line)):
            found[-1].weights, found[-1].rated = "ema" if record[1] else "model", True
    return found


def _parse(text: str) -> tuple[str, Values]:
    """x counts the evaluations of the same weights."""
    values: Values = defaultdict(dict)
    counts = {"": 0, "ema_": 0}
    for each in read_evaluations(text.splitlines()):
        prefix = "ema_" if each.weights == "ema" else ""
        counts[prefix] += 1
        for key, value in each.numbers.items():
            values[f"val/{prefix}{key}"][counts[prefix]] = value
    return "evaluation", values


def _scale_up(text: str) -> tuple[str, Values]:
    """x is the side of the images. ValueError for several models in one log."""
    values: Values = defaultdict(dict)
    _, *parts = _SIZE.split(text)
    for size, part in zip(map(float, parts[::2]), parts[1::2], strict=True):
        for each in read_evaluations(part.splitlines()):
            if values["val/top1"].get(size, each.numbers["top1"]) != each.numbers["top1"]:
                raise ValueError(f"has several results at {size:.0f} pixels: a log for each model can be read")
            for key, value in each.numbers.items():
                values[f"val/{key}"][size] = value
    return "pixel", values


SCALE_UP = Form("VMamba's scaleup.py", '"starting loop: img_size 224"', _SIZE.pattern, _scale_up)
FORM = Form("evaluations", '"* Acc@1 81.5 Acc@5 95.5"', rf"{_ACCURACY.pattern}|{_ROUNDED.pattern}", _parse)
