"""Every test starts from the same random state; `gpu` tests skip themselves where there is no CUDA device."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked full")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not config.getoption("--all"):
        reasons["full"] = "runs with --all"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
