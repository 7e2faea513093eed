"""metrics.csv of Lightning's CSVLogger."""

import math
import re
from collections import defaultdict

from analyze.logs.form import Form, Values, rows

# the columns have the names that the user's module gives them
_TRAIN = re.compile(r"train(?:ing)?[_/](.+?)(_step|_epoch)?")
_VAL = re.compile(r"val(?:id|idation)?[_/](.+?)(?:_epoch)?")
_RATE = re.compile(r"lr(?:-\w+)?(?:/pg1)?|learning_rate")
_TOP1 = re.compile(r"(?:multiclass)?acc(?:uracy)?(?:1|_?top1|@1)?|top1", re.IGNORECASE)


def _parse(text: str) -> tuple[str, Values]:
    """Rows hold what was logged at a time, with epoch and step, both from 0. An accuracy that is never above 1 is taken
    for a share."""
    found = [row for row in rows(text) if "epoch" in row and "step" in row]
    # steps of an epoch: the fewest with which every row lies in its own
    length = max((math.ceil((row["step"] + 1) / (row["epoch"] + 1)) for row in found), default=1)
    values: Values = defaultdict(dict)
    for row in found:
        x = (row.pop("step") + 1) / length
        epoch = row.pop("epoch")
        for key, value in row.items():
            name, at = _curve(key, x, epoch)
            values[name][at] = value
    top1 = values.get("val/top1", {})
    if max(top1.values(), default=100.0) <= 1:
        values["val/top1"] = {x: 100 * value for x, value in top1.items()}
    return "epoch", values


def _curve(key: str, x: float, epoch: float) -> tuple[str, float]:
    """The name of a column's curve, and where its value belongs; a name of its own stays as it is."""
    if _RATE.fullmatch(key):
        return "train/lr", x
    if train := _TRAIN.fullmatch(key):
        mean = train[2] == "_epoch"
        return (f"epoch/train_{train[1]}", epoch + 0.5) if mean else (f"train/{train[1]}", x)
    if val := _VAL.fullmatch(key):
        return f"val/{'top1' if _TOP1.fullmatch(val[1]) else val[1]}", x
    return ("train/loss" if key == "loss" else key), x


FORM = Form(
    "Lightning's metrics.csv",
    "a header with epoch and step",
    r"\A(?=[^\n]*\bepoch\b)(?=[^\n]*\bstep\b)\w[^\n]*,",
    _parse,
)
