"""Four iterations of UPerNet on scenes of digits in the layout of ADE20K."""

import pytest

from tests.dense_fixtures import call, data, fast_mmengine, trained  # noqa: F401
from tests.dense_tools import ROOT, Task


@pytest.fixture(scope="session")
def task():
    return Task(
        "segmentation",
        ROOT / "configs/segmentation/digits/upernet_vmamba-nano_digits.py",
        ["train_cfg.max_iters=4", "train_cfg.val_interval=4", "default_hooks.checkpoint.interval=2"],
    )
