"""Logs of our own trainer."""

from collections import defaultdict

from analyze.logs.form import Form, Values, objects, rows
from ssm_train.record.curves import curves


def _log(text: str) -> tuple[str, Values]:
    found = curves("", objects(text)).series
    return "epoch", {key: dict(zip(series.x, series.y, strict=True)) for key, series in found.items()}


# column, curve, how far before the end of the epoch
_COLUMNS = (
    ("train_loss", "epoch/train_loss", 0.5),
    ("lr", "train/lr", 0.0),
    *((key, f"val/{key}", 0.0) for key in ("top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss")),
)


def _summary(text: str) -> tuple[str, Values]:
    """A row per validated epoch, counted from 1."""
    values: Values = defaultdict(dict)
    for row in rows(text):
        for key, name, before in _COLUMNS:
            if {"epoch", key} <= row.keys():
                values[name][row["epoch"] - before] = row[key]
    return "epoch", values


LOG = Form("ours", 'lines that begin with {"kind": "', r'^\{"kind": "', _log)
SUMMARY = Form("our summary.csv", "a header epoch,update,lr", r"\Aepoch,update,lr,", _summary)
