"""The config for data of one's own in docs/detection.md: it is what it says, and a detector trains with it."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mmdet")
pytestmark = pytest.mark.dense

from detection.tools import train as tool  # noqa: E402
from ssm_mm.checkpoints import read  # noqa: E402
from tests.dense_tools import ROOT, recorded  # noqa: E402

PRINTED = "configs/detection/vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"
NANO = "configs/detection/digits/mask-rcnn_vmamba-nano_fpn_digits.py"


def write_config(folder: Path, **replaced: str) -> Path:
    """The printed config, with the path of its base made absolute and parts of it replaced."""
    [text] = re.findall(r"```python\n(_base_.*?)```", (ROOT / "docs" / "detection.md").read_text(), flags=re.DOTALL)
    for old, new in {PRINTED: str(ROOT / PRINTED), **replaced}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / "own.py"
    path.write_text(text)
    return path


def two_classes(scenes: Path, folder: Path) -> None:
    """The scenes of digits, as even and odd ones."""
    (folder / "images").mkdir(parents=True)
    for split in ("train", "val"):
        content = json.loads((scenes / "annotations" / f"instances_{split}2017.json").read_text())
        content["categories"] = [{"id": 7, "name": "even"}, {"id": 9, "name": "odd"}]  # ids as they come
        for annotation in content["annotations"]:
            annotation["category_id"] = 7 if (annotation["category_id"] - 1) % 2 == 0 else 9
        for image in content["images"]:
            name = f"{split}_{image['file_name']}"
            shutil.copy(scenes / f"{split}2017" / image["file_name"], folder / "images" / name)
            image["file_name"] = name
        (folder / f"{split}.json").write_text(json.dumps(content))


def test_the_printed_config(tmp_path):
    from mmengine.config import Config

    cfg = Config.fromfile(write_config(tmp_path))
    assert cfg.model.backbone.name == "vmamba_tiny_s1l8" and cfg.model.backbone.type == "SSMBackbone"
    heads = cfg.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == 2
    assert cfg.train_dataloader.dataset.ann_file == "train.json" and cfg.test_dataloader.dataset.ann_file == "val.json"
    assert cfg.test_evaluator.ann_file == "data/own/val.json" and cfg.test_evaluator.type == "CocoMetric"


def test_two_classes_are_learned_and_recorded(data, call, tmp_path):
    """One epoch: the heads have two classes, and TensorBoard has the same average precision as mmengine's own log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, work = tmp_path / "own", tmp_path / "work"
    two_classes(data, folder)
    replaced = {str(ROOT / PRINTED): str(ROOT / NANO), '("cat", "dog")': '("even", "odd")', "data/own/": f"{folder}/"}
    config = write_config(tmp_path, **replaced)
    options = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    outcome = call(tool, "--from-scratch", "--work-dir", work, config=config, options=options, root=folder)
    assert outcome.status == 0, outcome.err
    weights = read(work / "epoch_1.pth")["state_dict"]
    assert len(weights["roi_head.bbox_head.fc_cls.weight"]) == 2 + 1  # and background
    assert len(weights["roi_head.mask_head.conv_logits.weight"]) == 2
    [events] = work.glob("*/vis_data/events.out.tfevents.*")
    seen = EventAccumulator(str(events))
    seen.Reload()
    precision = recorded(work, "coco/bbox_mAP")["coco/bbox_mAP"]
    assert seen.Scalars("coco/bbox_mAP")[0].value == pytest.approx(precision)
