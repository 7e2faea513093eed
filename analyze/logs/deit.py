"""Logs of DeiT's trainer and those made of it: ConvNeXt, Vim, RMT, ..."""

from collections import defaultdict

from analyze.logs.form import Form, Values, numbers, objects

_NAMES = {
    "train_lr": "train/lr",
    "train_grad_norm": "train/grad_norm",
    "test_loss": "val/loss",
    "test_acc1": "val/top1",
    "test_acc5": "val/top5",
}
# of averaged weights, as ConvNeXt and as RMT write them
_NAMES |= {f"test_{key}_ema": f"val/ema_{name}" for key, name in (("loss", "loss"), ("acc1", "top1"), ("acc5", "top5"))}
_NAMES |= {f"test_ema_{key}": f"val/ema_{name}" for key, name in (("loss", "loss"), ("acc1", "top1"), ("acc5", "top5"))}


def _parse(text: str) -> tuple[str, Values]:
    """One object per epoch, which counts from 0, with means over it."""
    values: Values = defaultdict(dict)
    for row in map(numbers, objects(text)):
        if "epoch" not in row:
            continue
        if "train_loss" in row:
            values["epoch/train_loss"][row["epoch"] + 0.5] = row["train_loss"]
        for key, name in _NAMES.items():
            if key in row:
                values[name][row["epoch"] + 1] = row[key]
    return "epoch", values


FORM = Form("DeiT, ConvNeXt or Vim", 'a JSON object per line, with "train_loss"', r'^\{.*"train_loss": ', _parse)
