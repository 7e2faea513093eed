"""Training logs of this repository and of others, as curves. What a file holds is recognised by its content.

| form | files | x |
|---|---|---|
| ours | `log.jsonl`, `summary.csv` | epochs |
| Swin | text of Swin, VMamba and VSSD trainers, `log_rank0.txt` | epochs |
| evaluations | their text without training | number of the evaluation; pixels a side in VMamba's `scaleup.py` |
| DeiT | one JSON object per epoch, `log.txt` of DeiT, ConvNeXt and Vim | epochs |
| MMEngine scalars | `vis_data/scalars.json` of MMEngine | epochs, or iterations where training counts these |
| OpenMMLab text | `.log` of MMEngine and of its predecessor MMCV | the same |
| timm | `summary.csv` | epochs |
| Hugging Face | `trainer_state.json` | epochs |
| Lightning | `metrics.csv` of its CSVLogger | epochs |

Curves have the names of `ssm_train.record.curves`: "train/loss", "epoch/train_loss" (mean of an epoch, at its middle),
"train/lr", "val/top1", "val/ema_top1" in percent, ...; of other libraries, "train/" or "val/" and the library's own
name, in its own unit ("val/coco/bbox_mAP" is a share, "val/mIoU" percent).
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

from analyze.logs import deit, evaluations, huggingface, lightning, openmmlab, ours, swin, timm_summary
from ssm_train.common.errors import UserError
from ssm_train.record.curves import Series

# where several fit, the first counts
FORMS = (
    huggingface.FORM,
    ours.LOG,
    ours.SUMMARY,
    deit.FORM,
    openmmlab.SCALARS,
    swin.FORM,
    openmmlab.TEXT,
    evaluations.SCALE_UP,
    evaluations.FORM,
    timm_summary.FORM,
    lightning.FORM,
)


class Log(NamedTuple):
    """The curves of one training; `unit` of all x is "epoch" (1.5 is half-way through the second), "iteration",
    "evaluation" or "pixel"."""

    name: str
    unit: str
    series: dict[str, Series]


def read_log(path: Path) -> Log:
    """The curves in the file `path`. UserError where it cannot be read, is of no known form, or holds no numbers."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"cannot read log {path}: {error.strerror}") from error
    form = next((form for form in FORMS if re.search(form.mark, text, re.MULTILINE)), None)
    if form is None:
        known = "; ".join(f"{form.name}: {form.looked_for}" for form in FORMS)
        raise UserError(f"log {path} is of no known form; looked for: {known}")
    try:
        unit, values = form.parse(text)
    except ValueError as error:
        raise UserError(f"log {path} looks like {form.name}, but {error}") from error
    series = {key: _series(points) for key, points in values.items() if points}
    if not series:
        raise UserError(f"log {path} looks like {form.name}, but holds no numbers of training or validation")
    return Log(_name(path), unit, series)


def _name(path: Path) -> str:
    """What tells a log from others: the names of such files repeat, those of their folders do not."""
    folders = [part for part in path.resolve().parts[1:-1] if part != "vis_data"]
    repeating = ("log", "log_rank0", "scalars", "summary", "trainer_state", "metrics")
    return folders[-1] if path.stem in repeating and folders else path.stem


def _series(points: dict[float, float]) -> Series:
    ordered = sorted(points.items())
    return Series([x for x, _ in ordered], [y if math.isfinite(y) else math.nan for _, y in ordered])
