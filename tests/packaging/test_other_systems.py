"""On Windows and macOS: what is imported, computed, saved and locked, acted on Linux by other_system.py."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from ssm_train.record.checkpoint import Position, read_checkpoint
from ssm_train.record.store import CheckpointStore

HERE = Path(__file__).parent


def run_as_elsewhere(folder: Path, *arguments: str) -> list[str]:
    """What portable_program.py prints, in the empty `folder`; where no encoding is named texts are ASCII, so that what
    depends on the system's encoding fails."""
    command = [sys.executable, str(HERE / "other_system.py"), str(HERE / "portable_program.py"), *arguments]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=folder, env=os.environ | plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def imported(folder: Path, *packages: str) -> set[str]:
    said = run_as_elsewhere(folder, "import", *packages)
    return {line.removeprefix("imported ") for line in said if line.startswith("imported ")}


def test_no_module_needs_what_only_posix_has(tmp_path):
    found = imported(tmp_path, "ssm_ops", "ssm_models", "ssm_train", "analyze")
    assert len(found) > 200
    assert found >= {"ssm_ops._trust", "ssm_models.weights.download", "ssm_train.common.fileio", "analyze.impl.erf"}


@pytest.mark.dense
def test_nor_do_those_of_detection_and_segmentation(tmp_path):
    pytest.importorskip("mmdet")
    found = imported(tmp_path, "ssm_mm")
    assert len(found) > 15 and "ssm_mm.runner" in found


def check_use(said: list[str], folder: Path) -> None:
    assert "logits (1, 10) (1, 10)" in said and "evaluated 0" in said
    assert [line for line in said if line.startswith("trained ")] == ["trained 1 0", "trained 2 0", "trained 1 0"]
    (first,) = folder.glob("run-*/checkpoints")  # set aside by --fresh
    assert read_checkpoint(first / "last").position.epoch == 2
    assert (first / "last").is_dir() and not (first / "last").is_symlink()
    assert {f"memory {8 * 2**30} peak 0.0", "asked to stop by SIGTERM"} <= set(said)
    assert any(line.startswith("mine is in use by process ") for line in said) and "locked twice" not in said
    assert said[-1] == "holds True"


def test_models_training_and_locks_work_without(tmp_path):
    check_use(run_as_elsewhere(tmp_path, "use", "0"), tmp_path)


def test_where_a_file_system_has_no_links(tmp_path, monkeypatch):
    """Folders of the same files stand for them, as memory cards and some network drives make us do on Linux, too."""

    def refuse(code: int) -> None:
        monkeypatch.setattr(os, "symlink", Mock(side_effect=OSError(code, os.strerror(code))))

    store, first, second = CheckpointStore(tmp_path, keep=2), Position(1), Position(2)
    for position in (first, second):
        store.save(position, model={"w": torch.tensor([1.0 * position.epoch])}, ema=None, train_state={}, meta={})
    for code in (errno.EPERM, errno.ENOTSUP):
        refuse(code)
        store.link({"last": first})
        store.link({"last": second})
        assert os.path.samefile(tmp_path / "last" / "model.safetensors", tmp_path / second.name / "model.safetensors")
        assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name, "last"]
    refuse(errno.EACCES)
    with pytest.raises(PermissionError):
        store.link({"best": first})


@pytest.mark.full
def test_so_do_the_processes_that_load_data(tmp_path):
    """They are started anew there, which sends the data set and the functions of the loader to them."""
    check_use(run_as_elsewhere(tmp_path, "use", "1"), tmp_path)
