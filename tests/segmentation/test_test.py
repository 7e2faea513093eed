"""segmentation/tools/test.py: metrics, maps, pictures, test-time augmentation, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")
pytestmark = pytest.mark.dense

from mmengine.config import Config  # noqa: E402

from segmentation.tools import test as tool  # noqa: E402
from tests.dense_tools import config_with, metrics_of, recorded, refuses  # noqa: E402


def accuracy(maps, data):
    """Percent of right pixels; maps have the labels of the annotations, as mmsegmentation undoes reduce_zero_label."""
    right = total = 0
    for path in sorted((data / "annotations/validation").glob("*.png")):
        truth, predicted = (np.asarray(Image.open(image)) for image in (path, maps / path.name))
        right, total = right + (predicted == truth).sum(), total + truth.size
    return 100 * right / total


def test_evaluation(trained, call, data, tmp_path):
    """The metrics of the validation at the end of the training, and maps that have them."""
    flags = ["--work-dir", tmp_path / "work", "--out", tmp_path / "maps", "--show-dir", tmp_path / "shown"]
    assert call(tool, trained / "iter_4.pth", *flags).status == 0
    metrics = metrics_of(tmp_path / "work")
    assert metrics["mIoU"] == pytest.approx(recorded(trained, "mIoU")["mIoU"])
    assert metrics["aAcc"] == pytest.approx(accuracy(tmp_path / "maps", data), abs=0.01)
    assert len(list((tmp_path / "shown").rglob("*.png"))) == 2


def test_tta_of_a_config_without_it(task, trained, call, data, tmp_path):
    """By scales and flips; with a wrapped data set, and several evaluators of which one writes the maps."""
    plain = Config.fromfile(task.config).test_dataloader.dataset.to_dict()
    wrapped = {"_delete_": True, "type": "ConcatDataset", "datasets": [plain]}
    values = {"tta_model": None, "tta_pipeline": None, "test_dataloader": {"dataset": wrapped}}
    values["test_evaluator"] = [
        {"type": "IoUMetric", "iou_metrics": [kind], "prefix": kind} for kind in ("mIoU", "mFscore")
    ]
    config = config_with(task.config, tmp_path / "plain.py", **values)
    flags = ["--work-dir", tmp_path / "work", "--tta", "--out", tmp_path / "maps"]
    assert call(tool, trained / "iter_4.pth", *flags, config=config).status == 0
    metrics = metrics_of(tmp_path / "work")
    assert metrics["mIoU/aAcc"] == pytest.approx(accuracy(tmp_path / "maps", data), abs=0.01)
    assert "mFscore/mFscore" in metrics


def test_scales_and_flips():
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (2048, 512), "keep_ratio": True},
        {"type": "LoadAnnotations", "reduce_zero_label": True},
        {"type": "PackSegInputs"},
    ]
    load, tta = tool.scaled_and_mirrored(pipeline)
    resizes, flips, annotations, packs = tta["transforms"]
    assert load == pipeline[0] and annotations == [pipeline[2]] and packs == [pipeline[3]]
    sides = [(1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896)]
    assert [resize["scale"] for resize in resizes] == sides and all(resize["keep_ratio"] for resize in resizes)
    assert [flip["prob"] for flip in flips] == [0.0, 1.0]
    # of images as they are, by factors; annotations come after the flip, which would turn them, too
    unscaled = [pipeline[0], pipeline[2], pipeline[3]]
    _, tta = tool.scaled_and_mirrored(unscaled)
    assert [resize["scale_factor"] for resize in tta["transforms"][0]] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert tta["transforms"][2] == [pipeline[2]]


@pytest.mark.full
def test_tta_of_the_config(trained, call, tmp_path):
    assert call(tool, trained / "iter_4.pth", "--work-dir", tmp_path, "--tta").status == 0
    assert 0 <= metrics_of(tmp_path)["mIoU"] <= 100


def test_out_needs_an_evaluator_that_writes():
    cfg = Config({"test_evaluator": {"metrics": [{"type": "mmseg.IoUMetric"}, {"type": "IoUMetric"}]}})
    tool.write_maps(cfg, "maps")
    first, second = cfg.test_evaluator.metrics
    assert first.output_dir == "maps" and "output_dir" not in second
    with pytest.raises(
        tool.UserError, match="--out maps: maps are written by IoUMetric or .* test_evaluator has Depth"
    ):
        tool.write_maps(Config({"test_evaluator": [{"type": "DepthMetric"}]}), "maps")


def test_mistakes(call, tmp_path):
    torch.save({"state_dict": {"backbone.stem.weight": torch.ones(1)}}, tmp_path / "other.pth")
    refuses(call(tool, tmp_path / "other.pth"), "other.pth does not fit this EncoderDecoder: missing")
