"""modelcard.sh: every row has its config, a model of the zoo, weights, and arguments that the tools accept."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from analyze.impl import modelcard
from analyze.modelcard import main
from ssm_models.model_card import registered_models
from ssm_models.weights import entries
from ssm_train import cli as classifier
from ssm_train.config.load import load_config

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "modelcard.sh"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("CKPT", "GPUS", "DATA_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dry(capsys):
    """dry(*arguments): the words of every command that would be run, after the launcher's."""

    def call(*arguments: str) -> list[list[str]]:
        assert main([*arguments, "--dry-run"]) == 0
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
        for words in lines:
            assert words[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [words[4:] for words in lines]

    return call


def listed() -> dict[str, str]:
    return {line[:52].strip(): line[53:82].strip() for line in modelcard.listing()}


def test_every_published_row_is_listed():
    rows = modelcard.rows()
    assert {row.entry.name for row in rows.values() if row.entry} == {e.name for e in entries().values() if e.model}
    counts = {task: sum(row.task == task for row in rows.values()) for task in ("classification", "detection")}
    assert counts == {"classification": 25, "detection": 20} and len(rows) == 25 + 20 + 11 + 4
    assert listed()["vmamba_tiny_s1l8"] == "top-1 82.6"
    assert listed()["vssd_tiny_iccv2025_mesa"] == "top-1 83.8"
    assert listed()["mask-rcnn_vssd-small_fpn_ms-crop-3x_coco"] == "box AP 50.0, mask AP 44.6"
    assert listed()["upernet_vmamba-base-s2l15_160k_ade20k-512x512"] == "mIoU 51.0, mIoU tta 51.6"


def test_numbers_are_those_in_the_docs_of_the_configs():
    for name, row in modelcard.rows().items():
        head = row.config.read_text().split("_base_")[0]
        for metric, number in row.metrics.items():
            # yamls do not state the top-5; a row of other weights has a config of its own numbers
            if metric in ("top1", "box_ap", "mask_ap", "miou") and "." not in name and row.config.suffix == ".py":
                assert str(number) in head, (name, number)


def test_classifiers(dry, monkeypatch):
    monkeypatch.setenv("GPUS", "4")
    monkeypatch.setenv("DATA_PATH", "/images")
    commands = [words for words in dry() if words[1] == "classification/main.py"]
    rows = [row for row in modelcard.rows().values() if row.task == "classification"]
    tests = [words for words in commands if "--eval" in words]
    assert len(tests) == len(commands) - len(tests) == len(rows)
    for row, words in zip(rows, tests, strict=True):
        assert words[0] == "--nproc_per_node=4"
        args = classifier.parse_args(words[2:])
        assert (args.eval, args.pretrained, args.data_path) == (True, row.entry.name, "/images")
        assert load_config(str(ROOT / args.cfg)).MODEL.NAME == row.entry.model in registered_models()
    for row, words in zip(rows, (words for words in commands if "--eval" not in words), strict=True):
        args = classifier.parse_args(words[2:])
        # the authors fine-tuned the models of overlapping patches
        assert args.pretrained == (row.name.replace("_stride8", "") + ".in1k" if "stride8" in row.name else None)
        assert (args.tag, args.resume) == (row.name, "auto")


@pytest.mark.dense
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_detectors_and_segmentors(dry, task):
    arguments = pytest.importorskip("ssm_mm.arguments")
    pytest.importorskip("mmdet" if task == "detection" else "mmseg")
    from ssm_mm.config import read_config

    rows = {row.name: row for row in modelcard.rows().values() if row.task == task}
    seen = []
    for _, tool, *words in dry():
        if not tool.startswith(f"{task}/"):
            continue
        assert (ROOT / tool).is_file()
        if tool.endswith("train.py"):
            args = arguments.train_parser("train", "").parse_args(words)
            backbone = read_config(str(ROOT / args.config), args.cfg_options).model.backbone
            if backbone.type == "SAMEncoder":
                assert backbone.checkpoint == "sam_vit_b_01ec64.pth"
            else:
                entry = entries()[backbone.checkpoint]
                assert entry.model == backbone.name and entry.task == "classification"
            seen.append((Path(args.work_dir).name, "train"))
        else:
            args = arguments.test_parser("test", "", "").parse_args(words)
            name, _, action = Path(args.work_dir).name.rpartition("-")
            assert args.checkpoint == rows[name].entry.name and args.tta == (action == "tta")
            assert Path(args.config) == rows[name].config.relative_to(ROOT)
            seen.append((name, action))
    weights = [row for row in rows.values() if row.entry]
    assert len(seen) == len(set(seen)) == len(rows) + 2 * len(weights)


def test_files_of_ones_own(dry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my w.pth").touch()
    monkeypatch.setenv("CKPT", "my w.pth")
    name = "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco"
    [words] = dry(name, "tta", "--data-root", "my data")
    assert words[3] == str(tmp_path / "my w.pth") and words[-3:] == ["--tta", "--data-root", "my data"]
    [words] = dry("vmamba_tiny_s1l8", "--batch-size", "8")
    assert words[-4:] == ["--pretrained", str(tmp_path / "my w.pth"), "--batch-size", "8"]
    monkeypatch.delenv("CKPT")
    [words] = dry(name, "train", "--amp", "--cfg-options", "a=1", "b=2")
    assert words[-4:] == ["--cfg-options", "model.backbone.checkpoint=vmamba_tiny_s1l8.in1k", "a=1", "b=2"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "no name given"),
        (["vmamba_tiny"], {}, "vmamba_tiny is not in the list; did you mean .*vmamba_tiny_s1l8"),
        (["vmamba_tiny_s1l8"], {"CKPT": "no.pth"}, "CKPT no.pth does not exist"),
        (["vmamba_tiny_s1l8", "tta"], {}, "is a classifier"),
        (["upernet_vim-tiny_60k_ade20k-512x512"], {}, "were not published: give the file of yours as CKPT=FILE"),
        (["dual-sam_25e_mas3k-512x512"], {}, "weights of dual-sam_25e_mas3k-512x512 were not published"),
        (["vmamba_tiny_s1l8", "--dry-run"], {"GPUS": "0"}, "GPUS is '0'"),
        (["vmamba_tiny_s1l8", "--output", "here"], {}, "--output: results go to .*/output/vmamba_tiny_s1l8-test"),
    ],
)
def test_it_refuses_in_one_line(arguments, environment, message, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert re.fullmatch(f"error: .*{message}.*\n", said.err) and not said.out


def test_a_path_that_cfg_options_would_change_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "my w.pth").touch()
    monkeypatch.setenv("CKPT", str(tmp_path / "my w.pth"))
    assert main(["mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", "train"]) == 2
    assert "may hold no space" in capsys.readouterr().err


def test_the_script(tmp_path):
    """From any folder; without an environment it says what makes one."""
    clean = {"PATH": "/usr/bin:/bin"}
    help_ = subprocess.run(["bash", SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True, env=clean)
    if (ROOT / ".venv").is_dir():
        assert help_.returncode == 0 and "bash modelcard.sh NAME [test]" in help_.stdout
    copy = tmp_path / "modelcard.sh"
    copy.write_bytes(SCRIPT.read_bytes())
    done = subprocess.run(["bash", copy, "--list"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2 and re.fullmatch(
        "error: .* has not this repository: bash quickstart.sh installs it\n", done.stderr
    )


def test_published_and_measured():
    row = modelcard.find_row("vssd_tiny.in1k")
    lines, good = modelcard.compare(row, {"top1": 83.42}, 0.2)
    assert good and lines[1].split() == ["top-1", "83.60", "83.42", "-0.18"]
    lines, good = modelcard.compare(row, {"top1": 83.39}, 0.2)
    assert not good and lines[1].endswith("-0.21   beyond the tolerance of 0.2")
    assert modelcard.compare(row, {"top1": 83.4}, 0.2)[1]


@pytest.mark.parametrize(
    ("name", "action", "written", "expected"),
    [
        (
            "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco",
            "test",
            {"coco/bbox_mAP": 0.473, "coco/segm_mAP": 0.427, "coco/bbox_mAP_50": 0.7},
            {"box_ap": 47.3, "mask_ap": 42.7},
        ),
        ("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", "tta", {"coco/bbox_mAP": 0.48}, {}),
        ("upernet_vmamba-tiny-s1l8_160k_ade20k-512x512", "test", {"mIoU": 47.9, "aAcc": 82.0}, {"miou": 47.9}),
        ("upernet_vmamba-tiny-s1l8_160k_ade20k-512x512", "tta", {"mIoU": 48.8}, {"miou_tta": 48.8}),
        ("dual-sam_25e_ruwi-512x512", "test", {"mIoU": 0.904, "Sm": 0.903}, {"miou": 90.4}),
    ],
)
def test_results_of_detectors_and_segmentors(name, action, written, expected, tmp_path, monkeypatch):
    """As mmengine writes them, into a folder per run, of which the newest counts."""
    monkeypatch.setattr(modelcard, "OUTPUT", tmp_path)
    for number, content in enumerate((dict.fromkeys(written, 0.1), written)):
        folder = tmp_path / f"{name}-{action}" / f"2026110{number}"
        folder.mkdir(parents=True)
        (folder / f"2026110{number}.json").write_text(json.dumps(content))
        os.utime(folder / f"2026110{number}.json", (number, number))
    assert modelcard.measured(modelcard.find_row(name), action) == pytest.approx(expected)
