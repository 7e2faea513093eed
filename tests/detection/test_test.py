"""detection/tools/test.py: metrics, predictions, pictures, test-time augmentation, and what it refuses."""

import pickle

import pytest
import torch

pytest.importorskip("mmdet")
pytestmark = pytest.mark.dense

from detection.tools import test as tool  # noqa: E402
from tests.dense_tools import metrics_of, recorded, refuses  # noqa: E402


def test_evaluation(trained, call, tmp_path):
    """The metrics of the validation at the end of the training, and predictions of every image."""
    flags = ["--work-dir", tmp_path, "--out", tmp_path / "predictions.pkl", "--show-dir", "shown"]
    assert call(tool, trained / "epoch_2.pth", *flags).status == 0
    metrics, expected = metrics_of(tmp_path), recorded(trained, "coco/bbox_mAP")
    for name in ("coco/bbox_mAP", "coco/bbox_mAP_50", "coco/segm_mAP_50"):
        assert metrics[name] == pytest.approx(expected[name])
    predictions = pickle.loads((tmp_path / "predictions.pkl").read_bytes())
    assert [entry["img_id"] for entry in predictions] == [1, 2]
    assert len(list(tmp_path.glob("*/shown/*.png"))) == 2


def test_tta(trained, call, tmp_path):
    status, out, _ = call(tool, trained / "epoch_2.pth", "--work-dir", tmp_path, "--tta")
    assert status == 0 and "boxes alone are evaluated" in out
    metrics = metrics_of(tmp_path)
    assert 0 <= metrics["coco/bbox_mAP_50"] <= 1 and "coco/segm_mAP" not in metrics


def test_tta_of_wrapped_data_and_several_evaluators():
    """Every plain data set gets the flips, and every evaluator is told that masks are not merged."""
    from mmengine.config import Config

    part = {"type": "CocoDataset", "pipeline": [{"type": "LoadImageFromFile"}, {"type": "PackDetInputs"}]}
    wrapped = {"type": "ConcatDataset", "datasets": [part, {"type": "RepeatDataset", "times": 2, "dataset": part}]}
    metrics = [{"type": "CocoMetric", "metric": ["bbox", "segm"]}, {"type": "CocoMetric", "metric": "segm"}]
    cfg = Config({"model": {"type": "MaskRCNN"}, "test_dataloader": {"dataset": wrapped}, "test_evaluator": metrics})
    tool.add_tta(cfg)
    first, second = cfg.test_dataloader.dataset.datasets
    for dataset in (first, second.dataset):
        load, tta = dataset.pipeline
        assert load.type == "LoadImageFromFile" and [flip.prob for flip in tta.transforms[0]] == [1.0, 0.0]
    assert [evaluator.metric for evaluator in cfg.test_evaluator] == [["bbox"], ["bbox"]]
    assert cfg.model.type == "BoxTTAModel" and cfg.model.module.type == "MaskRCNN"


def test_mistakes(call, tmp_path):
    torch.save({"state_dict": {"backbone.stem.weight": torch.ones(1)}}, tmp_path / "other.pth")
    refuses(call(tool, tmp_path / "other.pth"), "other.pth does not fit this MaskRCNN: missing")
    refuses(call(tool, tmp_path / "other.pth", "--out", "predictions.json"), "predictions.json must end in .pkl")
