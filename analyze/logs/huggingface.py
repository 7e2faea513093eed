"""trainer_state.json of Hugging Face's Trainer."""

import json
from collections import defaultdict

from analyze.logs.form import Form, Values, numbers

_TRAIN = {"loss": "train/loss", "learning_rate": "train/lr", "grad_norm": "train/grad_norm"}
_SPEED = ("_runtime", "_per_second", "_time")


def _parse(text: str) -> tuple[str, Values]:
    """Entries of training have "loss", the mean since the entry before, and those of evaluations "eval_..."; accuracies
    are shares. ValueError for a file that ends early."""
    try:
        history = json.loads(text)["log_history"]
    except ValueError as error:
        raise ValueError(f"is no whole JSON ({error})") from error
    values: Values = defaultdict(dict)
    for row in map(numbers, history):
        if "epoch" not in row:
            continue
        for key, value in row.items():
            if key in _TRAIN and "loss" in row:
                values[_TRAIN[key]][row["epoch"]] = value
            elif key == "eval_accuracy":
                values["val/top1"][row["epoch"]] = 100 * value
            elif key.startswith("eval_") and not key.endswith(_SPEED):
                values[f"val/{key.removeprefix('eval_')}"][row["epoch"]] = value
    return "epoch", values


FORM = Form("Hugging Face's trainer_state.json", '"log_history": [', r'"log_history":\s*\[', _parse)
