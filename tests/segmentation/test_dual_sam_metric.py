"""The measures of marine animal segmentation, against their formulas."""

import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dense_tools import ROOT

pytest.importorskip("mmseg")
pytest.importorskip("py_sod_metrics")
pytestmark = pytest.mark.dense

from segmentation.dual_sam.metric import MarineMetric, measure  # noqa: E402


def masks():
    truth, predicted = np.zeros((2, 20, 30), bool)
    truth[6:14, 4:18], predicted[5:12, 5:20] = True, True
    return predicted, truth


def test_values():
    predicted, truth = masks()
    found = measure(predicted, truth)
    assert found["mIoU"] == pytest.approx((predicted & truth).sum() / (predicted | truth).sum())
    assert found["MAE"] == pytest.approx((predicted != truth).mean())
    a, b = predicted - predicted.mean(), truth - truth.mean()
    aligned = 2 * a * b / (a**2 + b**2)
    assert found["mEm"] == pytest.approx(((aligned + 1) ** 2 / 4).sum() / (truth.size - 1))
    assert 0.5 < found["Sm"] < 0.9 and 0.5 < found["wFm"] < 0.9
    right = measure(truth, truth)
    assert right == pytest.approx({"mIoU": 1, "Sm": 1, "wFm": 1, "mEm": 600 / 599, "MAE": 0}, abs=1e-6)
    wrong = measure(~truth, truth)
    assert [wrong[name] for name in ("mIoU", "Sm", "wFm", "mEm", "MAE")] == pytest.approx([0, 0, 0, 0, 1], abs=0.03)


def test_an_empty_prediction_is_none_or_with_legacy_all():
    empty, truth = np.zeros((20, 30), bool), masks()[1]
    assert measure(empty, truth)["mIoU"] == 0
    old = measure(empty, truth, legacy=True)
    assert old["mIoU"] == pytest.approx(truth.mean())
    assert old["mEm"] == pytest.approx(measure(~empty, truth)["mEm"])
    assert all(old[name] == measure(empty, truth)[name] for name in ("Sm", "wFm", "MAE"))
    predicted = masks()[0]
    assert measure(predicted, truth, legacy=True) == pytest.approx(measure(predicted, truth))


def sample(predicted, truth, **info):
    wrap = lambda mask: {"data": torch.from_numpy(mask)[None].float()}  # noqa: E731
    return {"pred_sem_seg": wrap(predicted), "gt_sem_seg": wrap(truth), "img_path": "folder/a.jpg", **info}


def test_predictions_of_a_legacy_model_are_measured_as_such():
    _, truth = masks()
    metric = MarineMetric()
    metric.process({}, [sample(0 * truth, truth, legacy=True)])
    assert metric.evaluate(1)["mIoU"] == pytest.approx(truth.mean(), abs=1e-4)


def test_means_over_images(tmp_path):
    predicted, truth = masks()
    metric = MarineMetric(output_dir=str(tmp_path / "maps"))
    metric.process({}, [sample(predicted, truth), sample(truth, truth)])
    found = metric.evaluate(2)
    assert found["mIoU"] == pytest.approx((measure(predicted, truth)["mIoU"] + 1) / 2, abs=1e-4)
    assert list(found) == ["mIoU", "Sm", "wFm", "mEm", "MAE"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "maps/a.png")), 255 * truth.astype(np.uint8))


def test_images_without_animal_are_counted_apart():
    predicted, truth = masks()
    metric = MarineMetric()
    metric.process({}, [sample(predicted, truth), sample(predicted, 0 * truth)])
    found = metric.evaluate(2)
    assert found["mIoU"] == pytest.approx(measure(predicted, truth)["mIoU"], abs=1e-4)
    assert (found["empty"], found["empty_MAE"]) == (1, pytest.approx(predicted.mean(), abs=1e-4))
    metric.process({}, [sample(predicted, 0 * truth)])
    assert metric.evaluate(1) == {"empty": 1, "empty_MAE": pytest.approx(predicted.mean(), abs=1e-4)}


def test_the_pinned_version_is_installed():
    """By a line that install_dense.sh reads."""
    pinned = re.findall(r"^# without its dependencies: (\S+)", (ROOT / "requirements-dense.txt").read_text(), re.M)
    assert pinned == [f"pysodmetrics=={version('pysodmetrics')}"]
    reader = (ROOT / ".ci/mmcv_wheel.sh").read_text()
    assert "--no-deps" in reader and "^# without its dependencies: " in reader
