"""What an exported file makes of labelled images, beside the model that it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from analyze import inputs
from ssm_train.common.errors import UserError
from ssm_train.config.defaults import default_config
from ssm_train.data.build import scan_split
from ssm_train.data.dataset import BadImage, load_image
from ssm_train.data.sources import ImageSource

_BATCH = 32


class Accuracy(NamedTuple):
    top1: float  # percent
    images: int
    per_second: float


def labelled_images(data_path: Path, checkpoint: Path | None, classes: int) -> ImageSource:
    """The validation images below `data_path`, as the run of `checkpoint` reads them, else val/<class>/*. Raises
    UserError, also where they are not of so many classes."""
    cfg = (inputs.run_config(checkpoint) or default_config()).clone()
    cfg.defrost()
    cfg.DATA.DATA_PATH, cfg.MODEL.NUM_CLASSES = str(data_path), classes
    return scan_split(cfg, "val")


@torch.inference_mode()
def accuracies(
    runners: dict[str, Callable[[Tensor], Tensor]], source: ImageSource, transform: Callable
) -> dict[str, Accuracy]:
    """Of all `runners`, which take turns on every batch. Images that cannot be read are left out; UserError where all
    are."""
    hits, seconds, count = dict.fromkeys(runners, 0), dict.fromkeys(runners, 0.0), 0
    for start in inputs.progress(range(0, len(source), _BATCH), "batches"):
        indices = range(start, min(start + _BATCH, len(source)))
        loaded = [(load_image(source, i, transform), int(source.targets[i])) for i in indices]
        readable = [(image, target) for image, target in loaded if not isinstance(image, BadImage)]
        if not readable:
            continue
        images = torch.stack([image for image, _ in readable])
        targets = torch.tensor([target for _, target in readable])
        count += len(targets)
        for name, run in runners.items():
            started = time.perf_counter()
            predicted = run(images).argmax(-1)
            seconds[name] += time.perf_counter() - started
            hits[name] += (predicted == targets).sum().item()
    if count == 0:
        raise UserError(f"none of the {len(source)} images in {source.root} is readable: give another --data-path")
    return {name: Accuracy(100 * hits[name] / count, count, count / seconds[name]) for name in runners}
