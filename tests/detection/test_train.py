"""detection/tools/train.py: training, resuming, profiling, and what it refuses."""

import json
import shutil

import pytest
import torch

pytest.importorskip("mmdet")
pytestmark = pytest.mark.dense

from detection.tools import train as tool  # noqa: E402
from ssm_mm.checkpoints import read  # noqa: E402
from tests.dense_tools import config_with, metrics_of, refuses  # noqa: E402

ONE_EPOCH = ["train_cfg.max_epochs=1", "train_cfg.val_interval=9"]


def finished(folder, weights):
    """A run that went on to the end: two updates of each of two epochs, with these names of weights."""
    last = read(folder / "epoch_2.pth")
    assert last["meta"]["epoch"] == 2 and last["optimizer"]["state"][0]["step"] == 4
    assert set(last["state_dict"]) == set(weights)


def test_training_changes_weights(trained):
    first, last = (read(trained / f"epoch_{epoch}.pth")["state_dict"] for epoch in (1, 2))
    name = "backbone.layers.0.blocks.0.op.in_proj.weight"
    assert not torch.equal(first[name], last[name])


def test_a_torn_checkpoint_is_named_and_passed_over(trained, call, tmp_path):
    shutil.copy(trained / "epoch_1.pth", tmp_path)
    (tmp_path / "epoch_2.pth").write_bytes((trained / "epoch_2.pth").read_bytes()[:100_000])
    refuses(call(tool, "--resume", tmp_path / "epoch_2.pth"), "epoch_2.pth is damaged")
    status, out, _ = call(tool, "--resume", "--work-dir", tmp_path)
    assert status == 0 and f"left out: checkpoint {tmp_path}/epoch_2.pth is damaged" in out
    finished(tmp_path, read(trained / "epoch_1.pth")["state_dict"])


@pytest.mark.full
def test_resuming_from_a_file(trained, call, tmp_path):
    outcome = call(tool, "--from-scratch", "--work-dir", tmp_path, "--resume", trained / "epoch_1.pth")
    assert outcome.status == 0
    finished(tmp_path, read(trained / "epoch_1.pth")["state_dict"])


@pytest.fixture
def nested(task, tmp_path):
    """A config that has the training's data set three times, inside wrappers of two depths."""
    from mmengine.config import Config

    plain = Config.fromfile(task.config).train_dataloader.dataset.to_dict()
    balanced = {"type": "ClassBalancedDataset", "oversample_thr": 1e-9, "dataset": plain}
    repeated = {"type": "RepeatDataset", "times": 1, "dataset": balanced}
    mixed = {"type": "MultiImageMixDataset", "dataset": plain, "pipeline": []}
    wrapped = {"_delete_": True, "type": "ConcatDataset", "datasets": [plain, repeated, mixed]}
    return config_with(task.config, tmp_path / "nested.py", train_dataloader={"dataset": wrapped})


def test_wrapped_data_sets(nested, call, tmp_path):
    """--data-root reaches every one of them."""
    outcome = call(tool, "--from-scratch", "--work-dir", tmp_path / "work", config=nested, options=ONE_EPOCH)
    assert outcome.status == 0
    assert read(tmp_path / "work/epoch_1.pth")["meta"]["iter"] == 3 * 4 / 2


def test_mistakes_inside_wrapped_data_sets(nested, call, tmp_path):
    inner = "train_dataloader.dataset.datasets.1.dataset.dataset"
    train = ["--from-scratch", "--work-dir", tmp_path / "work"]
    refuses(call(tool, *train, config=nested, options=[f"{inner}.ann_file=absent.json"]), "missing data", "absent.json")
    outcome = call(tool, *train, config=nested, options=[f"{inner}.metainfo.classes=('cat','dog')"])
    refuses(outcome, "instances_train2017.json has 0 of the 2 classes of the config (cat, dog...)")


def test_mistakes(call, tmp_path):
    train = ["--from-scratch", "--work-dir", tmp_path]
    refuses(call(tool, config="absent.py"), "config absent.py does not exist")
    refuses(call(tool), "the backbone vmamba_nano has no weights", "--from-scratch")
    refuses(call(tool, options=["model.backbone.checkpoint=absent.pth"]), "absent.pth does not exist")
    refuses(call(tool, "--from-scratch", root=tmp_path), "missing data", "instances_train2017.json", "val2017")
    refuses(
        call(tool, *train, options=["model.roi_head.bbox_head.num_classes=80"]),
        "roi_head.bbox_head.num_classes is 80, but the data has 10 classes",
    )
    refuses(
        call(tool, *train, options=["train_dataloader.dataset.metainfo.classes=('cat','dog')"]),
        "instances_train2017.json has 0 of the 2 classes of the config (cat, dog...)",
    )
    if not torch.cuda.is_available():
        refuses(call(tool, "--from-scratch", "--amp"), "--amp", "no CUDA device")


def test_arguments_of_the_backbone(call, tmp_path):
    outcome = call(tool, "--from-scratch", "--work-dir", tmp_path, options=["model.backbone.with_cp=True"])
    refuses(outcome, "SSMBackbone: with_cp is called use_checkpoint here")


@pytest.mark.parametrize("workers", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_broken_training_image_is_named(workers, call, data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "coco")
    (broken / "train2017/000003.png").write_bytes(b"not an image")
    options = [f"train_dataloader.num_workers={workers}"]
    outcome = call(tool, "--from-scratch", "--work-dir", tmp_path / "work", root=broken, options=options)
    refuses(outcome, "error: image", "000003.png of 12 bytes is damaged")


def test_annotations_with_an_empty_mask(call, data, tmp_path):
    """Left out of the training; refused in an evaluation, where pycocotools could not count them."""
    emptied = shutil.copytree(data, tmp_path / "coco")

    def empty_the_first(split):
        path = emptied / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["segmentation"] = []
        path.write_text(json.dumps(content))

    empty_the_first("train")
    outcome = call(tool, "--from-scratch", "--work-dir", tmp_path / "work", root=emptied, options=ONE_EPOCH)
    assert outcome.status == 0
    empty_the_first("val")
    outcome = call(tool, "--from-scratch", "--work-dir", tmp_path / "again", root=emptied)
    refuses(outcome, "instances_val2017.json has 1 annotations with an empty segmentation", "000001.png")


def test_profile(call, tmp_path):
    """The parts of a step are all positive, and the share is theirs."""
    status, out, _ = call(tool, "--from-scratch", "--profile", 2, "--work-dir", tmp_path)
    report = json.loads((tmp_path / "profile.json").read_text())
    seconds = report["seconds"]
    assert status == 0 and min(seconds.values()) > 0 and len(seconds) == 6
    backbone = seconds["backbone forward"] + seconds["backbone backward"]
    assert report["backbone_share"] == pytest.approx(backbone / (sum(seconds.values()) - seconds["data"]))
    assert f"the backbone takes {100 * report['backbone_share']:.1f} % of a step" in out
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.full
def test_two_processes_from_another_folder(task, data, tmp_path):
    """dist_train.sh and dist_test.sh with gloo; custom_imports are found from any working folder."""
    task.launch("dist_train.sh", 2, "--from-scratch", "--work-dir", "work", data=data, cwd=tmp_path, port=29631)
    assert read(tmp_path / "work/epoch_2.pth")["meta"]["iter"] == 2  # 4 images, 2 processes of 2, 2 epochs
    task.launch("dist_test.sh", "work/epoch_2.pth", 2, "--work-dir", "eval", data=data, cwd=tmp_path, port=29631)
    assert "coco/segm_mAP_50" in metrics_of(tmp_path / "eval")
