"""summary.csv of timm's train.py."""

import csv
from collections import defaultdict

from analyze.logs.form import Form, Values

_NAMES = {"train_loss": "epoch/train_loss", "lr": "train/lr"}


def _parse(text: str) -> tuple[str, Values]:
    """A row per epoch, counted from 0. With --model-ema the evaluations are of the averaged weights; no column says so.

    A row without evaluation is shorter than the header.
    """
    values: Values = defaultdict(dict)
    header, *rows = csv.reader(text.splitlines())
    for row in rows:
        keys = header if len(row) == len(header) else [key for key in header if not key.startswith("eval_")]
        if row == header or len(row) != len(keys):
            continue  # written again by a training that goes on; or torn
        cells = dict(zip(keys, row, strict=True))
        epoch = float(cells.pop("epoch"))
        for key, text_ in cells.items():
            kind, _, rest = key.partition("_")
            name = _NAMES.get(key) or {"train": f"train/{rest}", "eval": f"val/{rest}"}.get(kind)
            if name and text_:
                values[name][epoch + (0.5 if key == "train_loss" else 1)] = float(text_)
    return "epoch", values


FORM = Form("timm", "a header epoch,train_loss,eval_loss", r"\Aepoch,(?:train|eval)_\w+(?:,|$)", _parse)
