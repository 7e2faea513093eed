"""What a network said of every validation image: tables, and words for reports. ssm_train/answering.py collects it.

Files of a run folder, STEM being "validation" at the end of training and "evaluation" after --eval:

    STEM.csv            a row per image: the class it is of, the class it was taken for, confidence, loss in nats
    STEM_confusion.csv  of every class how many images were right, and what how many others were taken for
    STEM_worst.png      the images with the highest loss
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssm_models.printable import printable
from ssm_train.common.fileio import write_atomic

TRAINED, EVALUATED = "validation", "evaluation"

_COLUMNS = ("image", "class", "predicted", "confidence", "loss")
_MOST_CLASSES = 5  # in a line of the log


class Answer(NamedTuple):
    """Of one image; classes are labels."""

    index: int
    true: int
    predicted: int
    confidence: float
    loss: float


class ClassCount(NamedTuple):
    """How the images of a class were taken."""

    images: int
    right: int
    taken_for: tuple[tuple[int, int], ...]
    """Other classes and how often, the most frequent first."""


def by_class(answers: Sequence[Answer], count: int) -> list[ClassCount]:
    """Of each of `count` classes."""
    taken = [Counter() for _ in range(count)]
    for answer in answers:
        taken[answer.true][answer.predicted] += 1
    return [
        ClassCount(each.total(), each[label], tuple(pair for pair in each.most_common() if pair[0] != label))
        for label, each in enumerate(taken)
    ]


def worst(answers: Sequence[Answer], count: int) -> list[Answer]:
    """The `count` answers with the highest loss."""
    # what is not a number is worse than any
    return sorted(answers, key=lambda answer: (math.isnan(answer.loss), answer.loss), reverse=True)[:count]


def write_tables(
    folder: Path, stem: str, answers: Sequence[Answer], names: Sequence[str], images: Sequence[str]
) -> None:
    """Write the two tables of `stem`: `names` are those of the classes, `images` those of the answers' images."""
    rows = [
        (image, names[answer.true], names[answer.predicted], f"{answer.confidence:.6f}", f"{answer.loss:.6f}")
        for image, answer in zip(images, answers, strict=True)
    ]
    _write_csv(folder / f"{stem}.csv", [_COLUMNS, *rows])
    counts = enumerate(by_class(answers, len(names)))
    pairs = [(label, *pair) for label, each in counts for pair in ((label, each.right), *each.taken_for)]
    named = [(names[label], names[other], number) for label, other, number in pairs]
    _write_csv(folder / f"{stem}_confusion.csv", [("class", "predicted", "images"), *named])


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(path, text.getvalue())


def read_counts(path: Path) -> dict[str, dict[str, int]]:
    """A STEM_confusion.csv: of each class what its images were taken for, itself first, then the most frequent."""
    found: dict[str, dict[str, int]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["class"], {})[row["predicted"]] = int(row["images"])
    return found


def summary_line(answers: Sequence[Answer], names: Sequence[str]) -> str:
    """The classes that are recognised worst, in words."""
    counts = zip(names, by_class(answers, len(names)), strict=True)
    shares = sorted((each.right / each.images, name, each.images) for name, each in counts if each.images)
    return ", ".join(f"{printable(name)} {share:.1%} of {images}" for share, name, images in shares[:_MOST_CLASSES])
