"""All commands of analyze/: help at once, and a result without arguments."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analyze import quick
from ssm_train.common.errors import UserError

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.stem for path in (ROOT / "analyze").glob("*.py") if "cli.start(" in path.read_text())
HEAVY = ("torch", "timm", "matplotlib", "numpy", "PIL", "sklearn", "rich", "ssm_models", "ssm_train", "gradio")


def test_help_needs_no_heavy_import():
    """Of all commands in one process: each prints examples of itself, and nothing but the standard library is there."""
    code = """
import contextlib, importlib, io, json, sys
told = {}
for name in sys.argv[1].split(","):
    printed = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
        importlib.import_module(f"analyze.{name}").main(["--help"])
    told[name] = printed.getvalue()
print(json.dumps([told, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
    done = subprocess.run([sys.executable, "-c", code, ",".join(COMMANDS)], capture_output=True, text=True, check=True)
    told, imported = json.loads(done.stdout)
    assert len(COMMANDS) >= 15 and not set(HEAVY) & set(imported)
    for name, text in told.items():
        assert ("bash modelcard.sh NAME" if name == "modelcard" else f"\n  python analyze/{name}.py") in text, name
        assert "--out" in text or name in ("app", "get_ckpt", "modelcard"), name


def test_one_vocabulary_of_options():
    """Whatever a command does with models, weights, images, sizes and outputs is called the same everywhere."""
    for name in COMMANDS:
        text = (ROOT / "analyze" / f"{name}.py").read_text()
        for old, now in (("models", "model"), ("checkpoints", "checkpoint"), ("sizes", "size"), ("run", "checkpoint")):
            assert f'"--{old}"' not in text or f'"--{now}"' in text, (name, old)
        assert '"--image"' not in text or '"--images"' in text


def start(name: str, folder: Path, monkeypatch, capsys) -> tuple[str, str]:
    """The command without arguments; what it printed."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert importlib.import_module(f"analyze.{name}").main([]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("took ")
    return said.out, said.err


def check_pictures(path: Path) -> None:
    """PNG, and the same as SVG and PDF."""
    width, height = Image.open(path).size
    svg, pdf = path.with_suffix(".svg").read_text(), path.with_suffix(".pdf").read_bytes()
    assert "<svg" in svg and svg.count("<dc:date>") == 0 and pdf.startswith(b"%PDF")
    size = svg[svg.index("viewBox=") + 9 :].split('"')[0].split()
    assert [float(size[2]), float(size[3])] == pytest.approx([width * 72 / 150, height * 72 / 150], abs=1)


def test_attnmap(quickstart, monkeypatch, capsys):
    _, err = start("attnmap", quickstart, monkeypatch, capsys)
    digit = quick.DIGITS / "val" / "0" / "digit_0036.png"
    assert f"taking --checkpoint {quick.QUICKSTART} --images {digit}\n" in err
    check_pictures(quickstart / "runs/analyze/attnmap.png")
    found = np.load(quickstart / "runs/analyze/attnmap.npz")
    assert found["query"].tolist() == [16, 16] and found["CwBdtw_all"].shape == (8, 8)


def test_cam(quickstart, monkeypatch, capsys):
    start("cam", quickstart, monkeypatch, capsys)
    check_pictures(quickstart / "runs/analyze/cam.png")
    found = np.load(quickstart / "runs/analyze/cam.npz")
    assert len(found["images"]) == 12 and len({Path(name).parent for name in found["images"]}) == 10
    assert found["11_gradcam_overlay"].shape == (32, 32)


def test_predict(quickstart, monkeypatch, capsys):
    start("predict", quickstart, monkeypatch, capsys)
    check_pictures(quickstart / "runs/analyze/predict.png")
    rows = list(csv.DictReader((quickstart / "runs/analyze/predict.csv").open()))
    right = [row["class"] == Path(row["image"]).parent.name for row in rows if row["rank"] == "1"]
    assert len(rows) == 24 * 5 and sum(right) > 12  # after one epoch


def test_predictions_and_curves(quickstart, monkeypatch, capsys):
    for name, picture in (("predictions", "predictions.png"), ("loss", "curves.png")):
        out, _ = start(name, quickstart, monkeypatch, capsys)
        assert out == f"{quick.QUICKSTART / picture}\n"
        check_pictures(quickstart / quick.QUICKSTART / picture)


def test_linear_probe_makes_the_features(quickstart, monkeypatch, capsys):
    _, err = start("linear_probe", quickstart, monkeypatch, capsys)
    folder = Path("runs/analyze/features")
    assert f"taking --features {folder}\n" in err
    check_pictures(quickstart / folder / "probe.png")
    found = json.loads((quickstart / folder / "probe.json").read_text())
    assert (found["train images"], found["val images"]) == (1442, 355) and found["linear"]["top1"] > 80


def test_get_ckpt(quickstart, monkeypatch, capsys):
    out, _ = start("get_ckpt", quickstart, monkeypatch, capsys)
    assert "model    vmamba_nano\n" in out and "379,786 parameters" in out


@pytest.mark.full
@pytest.mark.parametrize(
    "name, numbers, lines",
    [
        ("erf", "erf.csv", 5 * 4),
        ("scaleup", "scaleup.csv", 6),
        ("tp", "tp.csv", 3 * 3 * 2),
        ("flops", "flops.csv", 28),
        ("features", None, 0),
        ("loop_overhead", None, 0),
        ("backbone_memory", "backbone_memory.csv", 1),
    ],
)
def test_longer_commands(name, numbers, lines, quickstart, monkeypatch, capsys):
    start(name, quickstart, monkeypatch, capsys)
    folder = quickstart / "runs/analyze"
    if numbers is None:
        found = json.loads((folder / ("features/features.json" if name == "features" else f"{name}.json")).read_text())
        assert found["model"] == "vmamba_nano"
        return
    rows = list(csv.DictReader((folder / numbers).open()))
    assert len(rows) >= lines and all(row.get("status", "ok") == "ok" for row in rows)
    if name in ("erf", "scaleup", "tp"):
        check_pictures(folder / f"{name}.png")


# ---- the run that is trained in place --------------------------------------------------------------------------------


def test_a_run_of_before_is_taken(tmp_path, monkeypatch, capsys):
    """quickstart.sh's before the one that was trained in place; without either one is trained, and kept."""
    monkeypatch.chdir(tmp_path)
    trained = []

    def train(folder: Path) -> None:
        trained.append(folder)
        folder.mkdir(parents=True)
        (folder / "metrics.json").touch()

    monkeypatch.setattr(quick, "train", train)
    assert quick.quick_run() == quick.quick_run() == quick.NANO and trained == [quick.NANO]
    assert "training a nano model on the digits" in capsys.readouterr().err
    quick.QUICKSTART.mkdir(parents=True)
    (quick.QUICKSTART / "metrics.json").touch()
    assert quick.quick_run() == quick.QUICKSTART


def test_a_training_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(quick, "digits", lambda: tmp_path)
    failed = subprocess.CompletedProcess([], 2, "", "some warning\nerror: no room left\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match="^training of runs/analyze/nano ended with 2: error: no room left; or give"):
        quick.train(quick.NANO)


@pytest.mark.full
def test_it_is_trained_in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quick.quick_run() == quick.NANO
    assert json.loads((quick.NANO / "metrics.json").read_text())["top1"] > 85
