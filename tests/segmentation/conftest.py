"""Scenes of digits in the layout of ADE20K, a short training of UPerNet on them, and the tools in the test process."""

import pytest

from tests.dense_tools import ROOT, Task, caller, mmengine_without_overhead, shared_folder

TASK = Task(
    "segmentation",
    ROOT / "configs/segmentation/digits/upernet_vmamba-nano_digits.py",
    ["train_cfg.max_iters=4", "train_cfg.val_interval=4", "default_hooks.checkpoint.interval=2"],
)


@pytest.fixture(scope="session")
def task():
    return TASK


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Shared and read-only."""
    from segmentation.data import digit_scenes

    def fill(folder):
        assert digit_scenes.main(["--out", str(folder), "--train", "4", "--val", "2"]) == 0

    return shared_folder(tmp_path_factory, "ade", fill)


@pytest.fixture(scope="session")
def fast_mmengine():
    with mmengine_without_overhead():
        yield


@pytest.fixture(scope="session")
def trained(data, fast_mmengine, tmp_path_factory):
    """The work folder of four iterations; shared and read-only."""
    from segmentation.tools import train

    def fill(folder):
        flags = ["--from-scratch", "--work-dir", str(folder), *TASK.flags(data)]
        assert train.main([str(TASK.config), *flags]) == 0

    return shared_folder(tmp_path_factory, "segmentor", fill)


@pytest.fixture
def call(data, fast_mmengine, capfd):
    return caller(TASK, data, capfd)
