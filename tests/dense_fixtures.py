"""Fixtures of the tests of detection and segmentation: scenes of digits, a short training on them, and the tools in the
test process. The conftest of each imports them and says in its fixture `task` what they are for."""

import importlib

import pytest

from tests.dense_tools import caller, mmengine_without_overhead, shared_folder


@pytest.fixture(scope="session")
def data(task, tmp_path_factory):
    """Shared and read-only."""
    digit_scenes = importlib.import_module(f"{task.name}.data.digit_scenes")

    def fill(folder):
        assert digit_scenes.main(["--out", str(folder), "--train", "4", "--val", "2"]) == 0

    return shared_folder(tmp_path_factory, f"{task.name}-scenes", fill)


@pytest.fixture(scope="session")
def fast_mmengine():
    with mmengine_without_overhead():
        yield


@pytest.fixture(scope="session")
def trained(task, data, fast_mmengine, tmp_path_factory):
    """The work folder of a short training; shared and read-only."""
    tool = importlib.import_module(f"{task.name}.tools.train")

    def fill(folder):
        flags = ["--from-scratch", "--work-dir", str(folder), *task.flags(data)]
        assert tool.main([str(task.config), *flags]) == 0

    return shared_folder(tmp_path_factory, f"{task.name}-trained", fill)


@pytest.fixture
def call(task, data, fast_mmengine, capfd):
    return caller(task, data, capfd)
