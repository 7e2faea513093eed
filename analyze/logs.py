"""Training logs of this repository and of others, as curves. What a file holds is recognised by its content.

| form | files | x |
|---|---|---|
| ours | `log.jsonl` | epochs |
| Swin | text of Swin, VMamba and VSSD trainers, `log_rank0.txt` | epochs |
| DeiT | one JSON object per epoch, `log.txt` of DeiT, ConvNeXt and Vim | epochs |
| MMEngine scalars | `vis_data/scalars.json` of MMEngine | epochs, or iterations where training counts these |
| OpenMMLab text | `.log` of MMEngine and of its predecessor MMCV | the same |

Curves have the names of `ssm_train.record.curves`: "train/loss", "epoch/train_loss" (mean of an epoch, at its middle),
"train/lr", "val/top1", "val/ema_top1" in percent, ...; of OpenMMLab, "train/" or "val/" and OpenMMLab's own name, in
its own unit ("val/coco/bbox_mAP" is a share, "val/mIoU" percent).
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ssm_train.common.errors import UserError
from ssm_train.record.curves import Series, curves

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"


class Log(NamedTuple):
    """The curves of one training; `unit` of all x is "epoch" (1.5 is half-way through the second) or "iteration"."""

    name: str
    unit: str
    series: dict[str, Series]


def read_log(path: Path) -> Log:
    """The curves in the file `path`. UserError where it cannot be read, is of no known form, or holds no training."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"cannot read log {path}: {error.strerror}") from error
    form = next((form for form in FORMS if re.search(form.mark, text, re.MULTILINE)), None)
    if form is None:
        known = "; ".join(f"{form.name} ({form.files})" for form in FORMS)
        raise UserError(f"log {path} is of no known form; these are known: {known}")
    unit, values = form.parse(text)
    if "train/loss" not in values and "epoch/train_loss" not in values:
        raise UserError(f"log {path} looks like {form.name}, but holds no training loss")
    return Log(_name(path), unit, {key: _series(points) for key, points in values.items() if points})


def _name(path: Path) -> str:
    """What tells a log from others: the names of such files repeat, those of their folders do not."""
    folders = [part for part in path.resolve().parts[1:-1] if part != "vis_data"]
    return folders[-1] if path.stem in ("log", "log_rank0", "scalars") and folders else path.stem


Values = dict[str, dict[float, float]]
"""Name of a curve -> x -> y. Where something was done again, the last time counts."""


def _series(points: dict[float, float]) -> Series:
    ordered = sorted(points.items())
    return Series([x for x, _ in ordered], [y if math.isfinite(y) else math.nan for _, y in ordered])


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of the lines that are whole; a killed process leaves one that is not."""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def _ours(text: str) -> tuple[str, Values]:
    found = curves("", _objects(text)).series
    return "epoch", {key: dict(zip(series.x, series.y, strict=True)) for key, series in found.items()}


_DEIT = {
    "train_lr": "train/lr",
    "train_grad_norm": "train/grad_norm",
    "test_loss": "val/loss",
    "test_acc1": "val/top1",
    "test_acc5": "val/top5",
    "test_loss_ema": "val/ema_loss",
    "test_acc1_ema": "val/ema_top1",
    "test_acc5_ema": "val/ema_top5",
}


def _deit(text: str) -> tuple[str, Values]:
    """One object per epoch, which counts from 0, with means over it."""
    values: Values = defaultdict(dict)
    for row in map(_numbers, _objects(text)):
        if "epoch" not in row:
            continue
        if "train_loss" in row:
            values["epoch/train_loss"][row["epoch"] + 0.5] = row["train_loss"]
        for key, name in _DEIT.items():
            if key in row:
                values[name][row["epoch"] + 1] = row[key]
    return "epoch", values


# of OpenMMLab: where, and how long it took
_BOOKKEEPING = {"epoch", "iter", "step", "eta", "time", "data_time"}


def _scalars(text: str) -> tuple[str, Values]:
    """Training steps have "iter", from 1 over all epochs; validations have their results and, as "step", the epoch or
    the iteration."""
    rows = list(map(_numbers, _objects(text)))
    train = [row for row in rows if "iter" in row]
    by_epoch = any("epoch" in row for row in train)
    # iterations of an epoch: the fewest with which every step lies in its own
    length = max((math.ceil(row["iter"] / row["epoch"]) for row in train if row.get("epoch")), default=1)
    values: Values = defaultdict(dict)
    for row in rows:
        if "iter" in row:
            _enter(values, "train", row["iter"] / length if by_epoch else row["iter"], row.items())
        elif "step" in row:
            _enter(values, "val", row["step"], row.items())
    return "epoch" if by_epoch else "iteration", values


def _enter(values: Values, kind: str, x: float, results: Iterable[tuple[str, float]]) -> None:
    for key, value in results:
        if key not in _BOOKKEEPING:
            values[f"{kind}/{key}"][x] = value


# ---- text ------------------------------------------------------------------------------------------------------------

_SWIN_STEP = re.compile(r"Train: \[(\d+)/\d+\]\[(\d+)/(\d+)\]\s*(.*)")
_SWIN_FIELD = re.compile(rf"(loss|lr|grad_norm|mem) ({_NUMBER})(?: \(({_NUMBER})\))?")
_SWIN_RESULT = re.compile(
    rf"\* Acc@1 ({_NUMBER}) Acc@5 ({_NUMBER})|Accuracy of the network .*?test images: ({_NUMBER})%"
)
_SWIN_VERDICT = re.compile(r"Max accuracy( ema)?: ")


def _swin(text: str) -> tuple[str, Values]:
    """Epochs and steps count from 0. The line "Max accuracy" after a result tells whose it is. Without one, the first
    result after an epoch is the model's, unless it is known: before training goes on, its checkpoint is tried again."""
    values: Values = defaultdict(dict)
    epoch: int | None = None
    result: dict[str, float] = {}

    def enter(prefix: str, again: bool) -> None:
        for key, value in result.items():
            points = values[f"val/{prefix}{key}"]
            if epoch is not None and (again or epoch + 1 not in points):
                points[epoch + 1] = value
        result.clear()

    for line in text.splitlines():
        if step := _SWIN_STEP.search(line):
            enter("", again=False)
            epoch, iteration, steps = map(int, step.groups()[:3])
            x = epoch + (iteration + 1) / steps
            for key, value, mean in _SWIN_FIELD.findall(step[4]):
                name = {"mem": "memory_mb"}.get(key, key)
                values[f"train/{name}"][x] = float(value)
                if key == "loss" and mean:
                    values["epoch/train_loss"][epoch + 0.5] = float(mean)
        elif found := _SWIN_RESULT.search(line):
            if not result:
                top1, top5, rounded = found.groups()
                result.update({"top1": float(rounded)} if top1 is None else {"top1": float(top1), "top5": float(top5)})
        elif verdict := _SWIN_VERDICT.search(line):
            enter("ema_" if verdict[1] else "", again=True)
    enter("", again=False)
    return "epoch", values


_MM_LINE = re.compile(r"\b(Epoch|Iter)(\(\w+\))?((?:\s*\[\s*\d+(?:/\d+)?\])+)(.*)")
_MM_FIELD = re.compile(rf"([\w./-]+): ({_NUMBER})(?=[\s,]|$)")


def _mm_text(text: str) -> tuple[str, Values]:
    """Epochs and steps count from 1. Validation in a training of iterations comes after the step logged last."""
    values: Values = defaultdict(dict)
    unit, reached = "epoch", 0.0
    for line in text.splitlines():
        found = _MM_LINE.search(line)
        if found is None:
            continue
        by, kind, place, rest = found.groups()
        *before, (step, steps) = re.findall(r"\[\s*(\d+)(?:/(\d+))?\]", place)
        fields = [(key, float(value)) for key, value in _MM_FIELD.findall(rest)]
        if kind in (None, "(train)"):
            unit = "epoch" if by == "Epoch" else "iteration"
            reached = int(before[0][0]) - 1 + int(step) / int(steps) if before else float(step)
            _enter(values, "train", reached, fields)
        elif kind == "(val)":
            # other lines of validation tell its progress: these have no results
            results = [(key, value) for key, value in fields if key != "memory"]
            _enter(values, "val", float(before[0][0]) if before else reached, results)
    return unit, values


# ---- which is which --------------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    name: str
    files: str
    mark: str
    """Regular expression of a line that no other form has."""
    parse: Callable[[str], tuple[str, Values]]


FORMS = (
    _Form("ours", "log.jsonl", r'^\{"kind": "', _ours),
    _Form("DeiT, ConvNeXt or Vim", "log.txt, a JSON object per epoch", r'^\{.*"train_loss": ', _deit),
    _Form("MMEngine's scalars", "vis_data/scalars.json", r'^\{.*"step": \d', _scalars),
    _Form("Swin, VMamba or VSSD", "log_rank0.txt", _SWIN_STEP.pattern, _swin),
    _Form("OpenMMLab's text", "work_dirs/*/*.log", _MM_LINE.pattern, _mm_text),
)
