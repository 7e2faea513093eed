"""The segmentation tools on scenes of digits: training, resuming, testing, drawing, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")
pytestmark = pytest.mark.dense

from segmentation.data import digit_scenes  # noqa: E402
from segmentation.tools import image_demo  # noqa: E402
from segmentation.tools import test as test_tool  # noqa: E402
from segmentation.tools import train as train_tool  # noqa: E402
from ssm_mm.checkpoints import read  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/segmentation/digits/upernet_vmamba-nano_digits.py"
SHORT = [
    "train_cfg.max_iters=4", "train_cfg.val_interval=4", "default_hooks.checkpoint.interval=2",
    "train_dataloader.batch_size=2", "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False", "log_level=ERROR",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "ade"
    assert digit_scenes.main(["--out", str(folder), "--train", "4", "--val", "2"]) == 0
    return folder


@pytest.fixture
def call(data, capfd):
    """call(tool, *arguments) -> (status, standard output, standard error), with short runs on the scenes."""

    def run(tool, *arguments, options=(), root=data):
        capfd.readouterr()
        flags = ["--data-root", str(root), "--cfg-options", *SHORT, *options]
        status = tool.main([str(CONFIG), *map(str, arguments), *flags])
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The work folder of four iterations."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--from-scratch", "--work-dir", str(folder), "--data-root", str(data), "--cfg-options", *SHORT]
    assert train_tool.main([str(CONFIG), *flags]) == 0
    return folder


def refuses(outcome, *parts):
    status, _, errors = outcome
    line = errors.strip().splitlines()[-1]
    assert status == 2 and line.startswith("error: "), errors
    for part in parts:
        assert part in line, line


def metrics_of(folder):
    [path] = folder.glob("*/*.json")
    return json.loads(path.read_text())


def test_training_resumes(trained, call, tmp_path):
    first, last = (read(trained / f"iter_{count}.pth")["state_dict"] for count in (2, 4))
    assert not torch.equal(first["decode_head.conv_seg.weight"], last["decode_head.conv_seg.weight"])
    (tmp_path / "iter_2.pth").write_bytes((trained / "iter_2.pth").read_bytes())
    (tmp_path / "iter_4.pth").write_bytes((trained / "iter_4.pth").read_bytes()[:-1000])
    status, out, _ = call(train_tool, "--work-dir", tmp_path, "--resume")
    assert status == 0 and f"left out: checkpoint {tmp_path}/iter_4.pth is damaged" in out
    again = read(tmp_path / "iter_4.pth")
    assert again["meta"]["iter"] == 4 and again["optimizer"]["state"][0]["step"] == 4


def test_evaluation(trained, call, tmp_path):
    """test.py gives the validation's metrics again, and the maps it writes have this IoU."""
    log = [json.loads(line) for line in next(trained.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    recorded = next(entry["mIoU"] for entry in log if "mIoU" in entry)
    status, *_ = call(test_tool, trained / "iter_4.pth", "--work-dir", tmp_path / "work", "--out", tmp_path / "maps")
    assert status == 0 and metrics_of(tmp_path / "work")["mIoU"] == pytest.approx(recorded)
    status, *_ = call(
        test_tool, trained / "iter_4.pth", "--work-dir", tmp_path / "tta", "--tta", "--show-dir", tmp_path / "shown"
    )
    assert status == 0 and 0 <= metrics_of(tmp_path / "tta")["mIoU"] <= 100
    assert len(list((tmp_path / "shown").rglob("*.png"))) == 2


def test_maps_written_by_the_test_have_the_reported_accuracy(trained, call, data, tmp_path):
    call(test_tool, trained / "iter_4.pth", "--work-dir", tmp_path / "work", "--out", tmp_path / "maps")
    right = total = 0
    for path in sorted((data / "annotations/validation").glob("*.png")):
        truth = np.asarray(Image.open(path)).astype(int) - 1
        # with reduce_zero_label mmsegmentation writes labels as they are in the annotations
        predicted = np.asarray(Image.open(tmp_path / "maps" / path.name)).astype(int) - 1
        right, total = right + (predicted == truth).sum(), total + truth.size
    assert metrics_of(tmp_path / "work")["aAcc"] == pytest.approx(100 * right / total, abs=0.01)


def test_pictures(trained, data, tmp_path):
    image = data / "images/validation/000001.png"
    flags = ["--config", str(CONFIG), "--checkpoint", str(trained / "iter_4.pth"), "--device", "cpu"]
    assert image_demo.main([str(image), *flags, "--out-dir", str(tmp_path)]) == 0
    drawn, original = (np.asarray(Image.open(path)) for path in (tmp_path / image.name, image))
    assert drawn.shape == original.shape and not np.array_equal(drawn, original)


def test_mistakes(trained, call, data, tmp_path):
    refuses(call(train_tool), "the backbone vmamba_nano has no weights", "--from-scratch")
    refuses(
        call(train_tool, "--from-scratch", root=tmp_path), "missing data", "images/training", "annotations/validation"
    )
    refuses(
        call(train_tool, "--from-scratch", "--work-dir", tmp_path, options=["model.decode_head.num_classes=150"]),
        "decode_head.num_classes is 150, but the data has 11 classes",
    )
    torch.save({"state_dict": {"backbone.stem.weight": torch.ones(1)}}, tmp_path / "other.pth")
    refuses(call(test_tool, tmp_path / "other.pth"), "other.pth does not fit this EncoderDecoder: missing")
    broken = tmp_path / "ade"
    subprocess.run(["cp", "-r", str(data), str(broken)], check=True)
    (broken / "images/training/000002.png").write_bytes(b"")
    refuses(call(train_tool, "--from-scratch", "--work-dir", tmp_path, root=broken), "000002.png is an empty file")


def test_two_processes_from_another_folder(data, tmp_path):
    """dist_train.sh and dist_test.sh with gloo, one batch norm per process."""
    environment = {"PYTHON": sys.executable, "PORT": "29651", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}

    def launch(script, *arguments):
        command = ["bash", str(ROOT / "segmentation/tools" / script), str(CONFIG), *arguments]
        command += ["--data-root", str(data), "--cfg-options", *SHORT]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]

    launch("dist_train.sh", "2", "--from-scratch", "--work-dir", "work")
    launch("dist_test.sh", "work/iter_4.pth", "2", "--work-dir", "eval")
    assert 0 <= metrics_of(tmp_path / "eval")["mIoU"] <= 100
