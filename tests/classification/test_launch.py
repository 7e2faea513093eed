"""The same run in every way of starting it: in this process, torchrun, torch.distributed.launch, python from elsewhere.

The launched processes are slow to start, so each start checks several things.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_train.cli import parse_args

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "classification" / "main.py"


def launch(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    # the launcher leaves a folder in TMPDIR
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd)}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_train_like_one(cli, read_log, tiny_cfg, tmp_path, port):
    """torchrun, 2 x 2 images against 1 x 4: the same loss curve, and validation over 15 images exact in both."""
    arguments = ["--cfg", tiny_cfg, "--batch-size", 2, "--output", tmp_path / "two", "--accumulation-steps", 2]
    done = launch(
        "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", MAIN, *arguments, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("4 images per update") == 0 and done.stdout.count("8 images per update") == 1
    assert cli("--batch-size", 4, "--accumulation-steps", 2, "--output", tmp_path / "one").status == 0
    one, two = (read_log(tmp_path / name, "train") for name in ("one", "two"))
    assert len(one) == len(two) == 2 * 2
    for alone, together in zip(one, two, strict=True):
        for key in ("epoch", "iteration", "update", "lr"):
            assert alone[key] == together[key]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    for alone, together in zip(*(read_log(tmp_path / name, "val") for name in ("one", "two")), strict=True):
        assert together["images"] == alone["images"] == 15
        assert (together["top1"], together["ema_top1"]) == (alone["top1"], alone["ema_top1"])
        for key in ("loss", "ema_loss"):
            assert together[key] == pytest.approx(alone[key], rel=1e-5)
    metrics = json.loads((tmp_path / "two/metrics.json").read_text())
    assert metrics["processes"] == 2

    # the other launcher, which adds --local-rank: exact evaluation of that run, with an unreadable image on one rank
    command = ["--nnodes=1", "--node_rank=0", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    checkpoint = tmp_path / "two/checkpoints/last"
    arguments = ["--cfg", tiny_cfg, "--batch-size", 3, "--eval", "--resume", checkpoint, "--output", tmp_path / "e2"]
    done = launch("-m", "torch.distributed.launch", *command, MAIN, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert cli("--eval", "--resume", checkpoint, "--output", tmp_path / "e1").status == 0
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["results"] for name in ("e1", "e2"))
    for weights in ("model", "model_ema"):
        assert two[weights]["images"] == 15
        assert (two[weights]["top1"], two[weights]["top5"]) == (one[weights]["top1"], one[weights]["top5"])
        assert two[weights]["loss"] == pytest.approx(one[weights]["loss"], rel=1e-6)


@pytest.mark.full
def test_training_cost_of_two_processes(torchrun, tiny_cfg, tmp_path):
    """Its steps hold exchanges, so both make as many of them."""
    done = torchrun(2, "--cfg", tiny_cfg, "--batch-size", 2, "--traincost", "--output", tmp_path / "none")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("training of vmamba_nano: ") == 1 and not (tmp_path / "none").exists()


def test_an_error_of_one_rank_ends_all_with_one_line(tiny_cfg, own_tree, tmp_path, port):
    """Too many unreadable images, found by the ranks that happen to read them."""
    for number in (1, 3, 5):
        (own_tree / f"train/dog/{number}.png").write_bytes(b"")
    arguments = ["--cfg", tiny_cfg, "--data-path", own_tree, "--batch-size", 2, "--output", tmp_path / "run"]
    arguments += ["--opts", "DATA.MAX_BAD_SHARE", 0.1, "PRINT_FREQ", 5]
    done = launch(
        "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", MAIN, *arguments, cwd=tmp_path
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "3 of 21 training images are unreadable" in errors[0]
    # the launcher prints a traceback of its own; none of ours
    assert "classification/" not in done.stderr.replace(str(MAIN), "").replace(errors[0], "")
    assert done.stdout.count("unreadable image, replaced") == 3
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"epoch_0000", "last"}


def test_plain_python_from_another_folder(tiny_cfg, tmp_path):
    done = launch(MAIN, "--cfg", tiny_cfg, "--output", "out", "--opts", "TRAIN.EPOCHZ", 1, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --opts: config key 'TRAIN.EPOCHZ'") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--local-rank=1", "--local_rank=1"])
def test_launcher_flag_is_accepted(flag):
    assert parse_args(["--cfg", "x.yaml", flag]).local_rank == 1
