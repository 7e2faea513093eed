"""The hostile run folders and weights of the other files again, in a process under limits of memory and time, where a
crash, a hang or a flood of memory would show; with a canary that would sing if anything in them were executed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .child import run_limited
from .test_run_folders import NAME, SPECIAL, STATES, WRONG, sign
from .test_run_folders import WEIGHTS as WRONG_WEIGHTS
from .test_values import CHANGES
from .test_weights import Touch

CHILD = """
import contextlib, io, sys
from pathlib import Path
from ssm_train.cli import main
cfg, root = sys.argv[1:]
for run in sorted(Path(root).iterdir()):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(["--cfg", cfg, "--output", str(run), "--resume", str(run / "checkpoints/epoch_0002")])
    lines = said.getvalue().splitlines()
    good = status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable()
    print(run.name, "refused" if good else (status, lines))
"""


@pytest.fixture
def valid(cli, tmp_path) -> Path:
    assert cli("--output", tmp_path / "valid", "--opts", "TRAIN.EPOCHS", 2).status == 0
    shutil.rmtree(tmp_path / "valid/checkpoints/epoch_0001")
    return tmp_path / "valid"


def write_all(root: Path, valid: Path, canary: Path) -> None:
    """A folder per fault."""
    count = 0

    def checkpoint() -> Path:
        nonlocal count
        count += 1
        shutil.copytree(valid, root / f"{count:03d}", symlinks=True)
        return root / f"{count:03d}/checkpoints/epoch_0002"

    for change in WRONG.values():
        folder = checkpoint()
        content = change(json.loads((folder / "meta.json").read_text()))
        (folder / "meta.json").write_text(json.dumps(content))
        sign(folder)
    for change, _ in STATES.values():
        folder = checkpoint()
        state = torch.load(folder / "train_state.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "train_state.pt")
        sign(folder)
    for part in ("optimizer", "scaler", "updates"):
        folder = checkpoint()
        state = torch.load(folder / "train_state.pt", weights_only=True)
        torch.save({**state, part: Touch(canary)}, folder / "train_state.pt")
        sign(folder)
    weights = [change for change, _ in WRONG_WEIGHTS.values()]
    weights += [
        lambda w, change=change: w.update({NAME: change(w[NAME]).contiguous()}) for change, _ in CHANGES.values()
    ]
    for change in weights:
        for file in ("model.safetensors", "model_ema.safetensors"):
            folder = checkpoint()
            content = load_file(folder / file)
            change(content)
            save_file(content, folder / file)
            sign(folder)
    for make in SPECIAL.values():
        for name in ("model.safetensors", "train_state.pt", "meta.json", "SHA256SUMS"):
            folder = checkpoint()
            (folder / name).unlink()
            make(folder / name)


def test_run_folders(valid, tiny_cfg, tmp_path):
    (tmp_path / "runs").mkdir()
    write_all(tmp_path / "runs", valid, tmp_path / "canary")
    count = len(list((tmp_path / "runs").iterdir()))
    assert count > 100
    command = [sys.executable, "-c", CHILD, str(tiny_cfg), str(tmp_path / "runs")]
    done = run_limited(command, memory_gb=6, seconds=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = done.stdout.splitlines()
    assert len(outcomes) == count and [line for line in outcomes if not line.endswith(" refused")] == []
    assert not (tmp_path / "canary").exists()
