"""Two epochs of Mask R-CNN on scenes of digits in COCO format."""

import pytest

from tests.dense_fixtures import call, data, fast_mmengine, trained  # noqa: F401
from tests.dense_tools import ROOT, Task


@pytest.fixture(scope="session")
def task():
    return Task(
        "detection",
        ROOT / "configs/detection/digits/mask-rcnn_vmamba-nano_fpn_digits.py",
        ["train_cfg.max_epochs=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=1"],
    )
