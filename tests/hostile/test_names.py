"""Names that are no UTF-8, or move a terminal's cursor: they stop nothing, and messages show them escaped."""

import json
import os
import subprocess
import sys

from ssm_models import CheckpointError
from ssm_models.printable import printable
from ssm_train.common.errors import UserError

from ..classification.conftest import MAIN

ODD = os.fsdecode(b"\xff\x1b]0;title\x07\n.png")
SHOWN = r"\xff\x1b]0;title\x07\n.png"


def test_printable():
    assert printable(ODD) == SHOWN
    assert printable("ümlaut 猫") == "ümlaut 猫"
    assert printable("\u202e\x00\x9b\U000e0001\ud800") == r"\u202e\x00\x9b\U000e0001\ud800"
    for error in (UserError(f"{ODD} is odd"), CheckpointError(f"{ODD} is odd")):
        assert str(error).isprintable() and r"\xff\x1b]0;title\x07" in str(error)


def test_unreadable_images_of_odd_names(cli, own_tree, tmp_path):
    for split in ("train", "val"):
        (own_tree / split / "cat" / ODD).write_bytes(b"no image")
    outcome = cli("--data-path", own_tree, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome
    assert "\x1b" not in outcome.out and outcome.out.count(f"train/cat/{SHOWN} (") == 1
    assert SHOWN in (tmp_path / "run/log.txt").read_text(encoding="utf-8")
    assert list(json.loads((tmp_path / "run/bad_images.json").read_bytes())) == [f"{own_tree}/train/cat/{SHOWN}"]
    assert SHOWN in (tmp_path / "run/report.md").read_text(encoding="utf-8")


def test_class_folders_of_odd_names(cli, own_tree, tmp_path):
    for split in ("train", "val"):
        (own_tree / split / "cat").rename(own_tree / split / ODD.removesuffix(".png"))
    outcome = cli("--data-path", own_tree, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome


def test_run_folders_of_odd_names_are_refused_at_the_start(fails, tmp_path):
    line = fails("--output", tmp_path / ODD, parts=("run folder", r"\xff\x1b]0;title", "choose another"))
    assert "\x1b" not in line and not list(tmp_path.iterdir())


def test_run_folders_of_all_that_is_utf8(cli, tmp_path):
    """Also what is not printable: the wide space of Japanese, a line end."""
    run = tmp_path / "実験\u3000一\nzwei"
    outcome = cli("--output", run, "--opts", "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)
    assert outcome.status == 0 and (run / "metrics.json").exists(), outcome
    assert cli("--output", run, "--resume", "auto", "--opts", "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0).status == 0


def test_a_terminal_without_unicode(tmp_path):
    """LANG=C: messages are written with escapes."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(MAIN), "--cfg", str(tmp_path / "käfer.yaml"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 2 and b"k\\xe4fer.yaml: No such file" in done.stderr and done.stderr.count(b"\n") == 1
