"""A folder with what quickstart.sh leaves: the digits, and a run on them, of one epoch here."""

import os
from pathlib import Path

import pytest

from analyze import quick
from ssm_train.cli import main


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory) -> Path:
    """Shared: commands write to runs/analyze in it."""
    folder = tmp_path_factory.mktemp("quickstart")
    before = Path.cwd()
    os.chdir(folder)
    try:
        quick.digits()
        place = ["--data-path", str(quick.DIGITS), "--output", str(quick.QUICKSTART), "--device", "cpu"]
        assert (
            main(["--cfg", str(quick.CONFIG), *place, "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]) == 0
        )
    finally:
        os.chdir(before)
    return folder
