"""The detection tools on scenes of digits: training, resuming, testing, drawing, and what they refuse."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytestmark = pytest.mark.dense

from mmengine.config import Config  # noqa: E402

from detection.data import digit_scenes  # noqa: E402
from detection.tools import image_demo  # noqa: E402
from detection.tools import test as test_tool  # noqa: E402
from detection.tools import train as train_tool  # noqa: E402
from ssm_mm.checkpoints import allow_mmengine_checkpoints, read  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/detection/digits/mask-rcnn_vmamba-nano_fpn_digits.py"
SHORT = [
    "train_cfg.max_epochs=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=1",
    "train_dataloader.batch_size=2", "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False", "log_level=ERROR",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "coco"
    assert digit_scenes.main(["--out", str(folder), "--train", "4", "--val", "2"]) == 0
    return folder


@pytest.fixture
def call(data, capfd):
    """call(tool, *arguments) -> (status, standard output, standard error), with short runs on the scenes."""

    def run(tool, *arguments, config=CONFIG, options=(), root=data):
        capfd.readouterr()
        flags = ["--data-root", str(root), "--cfg-options", *SHORT, *options]
        status = tool.main([str(config), *map(str, arguments), *flags])
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module", autouse=True)
def _readable():
    allow_mmengine_checkpoints()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The work folder of two epochs."""
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


def test_training_changes_weights_and_resumes(trained, call, tmp_path):
    """Epoch 2 after a resume from epoch 1 ends with the weights of the uninterrupted run."""
    whole = read(trained / "epoch_2.pth")["state_dict"]
    first = read(trained / "epoch_1.pth")["state_dict"]
    assert not torch.equal(first["backbone.layers.0.blocks.0.op.in_proj.weight"],
                           whole["backbone.layers.0.blocks.0.op.in_proj.weight"])  # fmt: skip
    status, *_ = call(
        train_tool, "--from-scratch", "--work-dir", tmp_path, "--resume", trained / "epoch_1.pth",
    )  # fmt: skip
    assert status == 0
    resumed = read(tmp_path / "epoch_2.pth")
    assert resumed["meta"]["epoch"] == 2 and resumed["optimizer"]["state"][0]["step"] == 4
    assert set(resumed["state_dict"]) == set(whole)


def test_a_torn_checkpoint_is_named_and_passed_over(trained, call, tmp_path):
    for name in ("epoch_1.pth", "epoch_2.pth"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "epoch_2.pth").write_bytes((trained / "epoch_2.pth").read_bytes()[:100_000])
    refuses(call(train_tool, "--resume", tmp_path / "epoch_2.pth"), "epoch_2.pth is damaged")
    status, out, _ = call(train_tool, "--resume", "--work-dir", tmp_path)
    assert status == 0 and f"left out: checkpoint {tmp_path}/epoch_2.pth is damaged" in out
    assert read(tmp_path / "epoch_2.pth")["meta"]["epoch"] == 2


def test_evaluation(trained, call, tmp_path):
    """test.py gives the metrics of the validation at the end of the training, and writes predictions of every image."""
    log = [json.loads(line) for line in next(trained.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    status, *_ = call(
        test_tool, trained / "epoch_2.pth", "--work-dir", tmp_path, "--out", tmp_path / "predictions.pkl",
        "--show-dir", "shown",
    )  # fmt: skip
    assert status == 0
    [metrics] = [json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")]
    recorded = next(entry for entry in log if "coco/bbox_mAP" in entry)
    for name in ("coco/bbox_mAP", "coco/bbox_mAP_50", "coco/segm_mAP_50"):
        assert metrics[name] == pytest.approx(recorded[name])
    with open(tmp_path / "predictions.pkl", "rb") as file:
        predictions = pickle.load(file)
    assert [entry["img_id"] for entry in predictions] == [1, 2]
    assert len(list(tmp_path.glob("*/shown/*.png"))) == 2
    refuses(call(test_tool, trained / "epoch_2.pth", "--out", "predictions.json"), "predictions.json must end in .pkl")


def test_tta(trained, call, tmp_path):
    status, out, _ = call(test_tool, trained / "epoch_2.pth", "--work-dir", tmp_path, "--tta")
    assert status == 0 and "boxes alone are evaluated" in out
    [metrics] = [json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")]
    assert 0 <= metrics["coco/bbox_mAP_50"] <= 1 and "coco/segm_mAP" not in metrics


def test_pictures_of_any_kind(trained, tmp_path, data, capfd):
    """Grey, alpha and, by value_range, 16-bit images are read, and the same picture gives the same drawing."""
    scene = Image.open(data / "val2017/000001.png").convert("L").convert("RGB")
    scene.save(tmp_path / "rgb.png")
    scene.convert("L").save(tmp_path / "grey.png")
    scene.convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) << 8).save(tmp_path / "deep.png")
    paths = [str(tmp_path / f"{kind}.png") for kind in ("rgb", "grey", "alpha", "deep")]
    flags = ["--checkpoint", str(trained / "epoch_2.pth"), "--device", "cpu"]
    assert image_demo.main([paths[-1], *flags, "--config", str(CONFIG)]) == 2
    assert "deep.png cannot be read: an image of mode I;16 " in capfd.readouterr().err
    cfg = Config.fromfile(CONFIG)
    cfg.test_dataloader.dataset.pipeline[0].value_range = (0, 255 << 8)
    cfg.dump(tmp_path / "deep.py")
    flags += ["--config", str(tmp_path / "deep.py")]
    assert image_demo.main([*paths, *flags, "--score", "0.0", "--out-dir", str(tmp_path / "out")]) == 0
    drawn = [np.asarray(Image.open(tmp_path / "out" / Path(path).name)) for path in paths]
    assert drawn[0].shape == (*np.asarray(scene).shape[:2], 3) and not np.array_equal(drawn[0], np.asarray(scene))
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])


def test_mistakes(trained, call, data, tmp_path, capfd):
    refuses(call(train_tool, config="absent.py"), "config absent.py does not exist")
    refuses(call(train_tool), "the backbone vmamba_nano has no weights", "--from-scratch")
    refuses(call(train_tool, options=["model.backbone.checkpoint=absent.pth"]), "absent.pth does not exist")
    refuses(call(train_tool, "--from-scratch", root=tmp_path), "missing data", "instances_train2017.json", "val2017")
    refuses(
        call(train_tool, "--from-scratch", "--work-dir", tmp_path, options=["model.roi_head.bbox_head.num_classes=80"]),
        "roi_head.bbox_head.num_classes is 80, but the data has 10 classes",
    )
    refuses(
        call(train_tool, "--from-scratch", "--work-dir", tmp_path,
             options=["train_dataloader.dataset.metainfo.classes=('cat','dog')"]),
        "instances_train2017.json has 0 of the 2 classes of the config (cat, dog...)",
    )  # fmt: skip
    if not torch.cuda.is_available():
        refuses(call(train_tool, "--from-scratch", "--amp"), "--amp", "no CUDA device")
    torch.save({"state_dict": {"backbone.stem.weight": torch.ones(1)}}, tmp_path / "other.pth")
    refuses(call(test_tool, tmp_path / "other.pth"), "other.pth does not fit this MaskRCNN: missing")
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    flags = ["--config", str(CONFIG), "--checkpoint", str(trained / "epoch_2.pth"), "--device", "cpu"]
    capfd.readouterr()
    assert image_demo.main([str(empty), *flags]) == 2
    assert f"error: image {empty} is an empty file" in capfd.readouterr().err
    assert image_demo.main([str(tmp_path / "nowhere.png"), *flags]) == 2
    assert "no such image" in capfd.readouterr().err


def test_a_broken_training_image_is_named(call, data, tmp_path):
    broken = tmp_path / "coco"
    subprocess.run(["cp", "-r", str(data), str(broken)], check=True)
    (broken / "train2017/000003.png").write_bytes(b"not an image")
    outcome = call(train_tool, "--from-scratch", "--work-dir", tmp_path / "work", root=broken)
    refuses(outcome, "000003.png of 12 bytes is damaged")
    workers = ["train_dataloader.num_workers=1"]
    outcome = call(train_tool, "--from-scratch", "--work-dir", tmp_path / "work", root=broken, options=workers)
    refuses(outcome, "error: image", "000003.png of 12 bytes is damaged")


def test_annotations_with_an_empty_mask(call, data, tmp_path):
    """Left out of the training; refused in an evaluation, where pycocotools could not count them."""
    emptied = tmp_path / "coco"
    subprocess.run(["cp", "-r", str(data), str(emptied)], check=True)

    def empty_the_first(split):
        path = emptied / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["segmentation"] = []
        path.write_text(json.dumps(content))

    empty_the_first("train")
    status, *_ = call(train_tool, "--from-scratch", "--work-dir", tmp_path / "work", root=emptied)
    assert status == 0
    empty_the_first("val")
    outcome = call(train_tool, "--from-scratch", "--work-dir", tmp_path / "again", root=emptied)
    refuses(outcome, "instances_val2017.json has 1 annotations with an empty segmentation", "000001.png")


def test_profile(call, tmp_path):
    """The parts of a step are all positive, and the share is theirs."""
    status, out, _ = call(train_tool, "--from-scratch", "--profile", 2, "--work-dir", tmp_path)
    report = json.loads((tmp_path / "profile.json").read_text())
    seconds = report["seconds"]
    assert status == 0 and min(seconds.values()) > 0 and len(seconds) == 6
    backbone = seconds["backbone forward"] + seconds["backbone backward"]
    assert report["backbone_share"] == pytest.approx(backbone / (sum(seconds.values()) - seconds["data"]))
    assert f"the backbone takes {100 * report['backbone_share']:.1f} % of a step" in out
    assert not list(tmp_path.glob("*.pth"))


def test_two_processes_from_another_folder(data, tmp_path):
    """dist_train.sh and dist_test.sh with gloo; custom_imports are found from any working folder."""
    environment = {"PYTHON": sys.executable, "PORT": "29631", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}

    def launch(script, *arguments):
        command = ["bash", str(ROOT / "detection/tools" / script), str(CONFIG), *arguments]
        command += ["--data-root", str(data), "--cfg-options", *SHORT]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]

    launch("dist_train.sh", "2", "--from-scratch", "--work-dir", "work")
    assert read(tmp_path / "work/epoch_2.pth")["meta"]["iter"] == 2  # 4 images, 2 processes of 2, 2 epochs
    launch("dist_test.sh", "work/epoch_2.pth", "2", "--work-dir", "eval")
    [metrics] = [json.loads(path.read_text()) for path in (tmp_path / "eval").glob("*/*.json")]
    assert "coco/segm_mAP_50" in metrics
