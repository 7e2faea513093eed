"""What marine animal segmentation is measured by, of binary masks: mIoU, S-measure, weighted F, E-measure and MAE."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from PIL import Image

from ssm_train.common.errors import UserError

try:
    import py_sod_metrics
except ImportError as error:
    raise UserError(f"pysodmetrics cannot be imported ({error}): run `bash install_dense.sh`") from error

_WHITE = 128  # of the E-measure's thresholds from 0 to 255: any above 0 leaves a binary mask as it is


class MarineMetric(BaseMetric):
    """Means over images, 0 to 1, by pysodmetrics, of predictions and masks of 0 and 1 in the size of the mask:

    mIoU  intersection over union of the animal
    Sm    S-measure, alpha 0.5
    wFm   weighted F-measure, beta^2 1
    mEm   E-measure
    MAE   mean absolute error

    Images whose mask has no animal have no IoU and no F-measure: they are counted apart, as `empty` (their number)
    and `empty_MAE`, and left out of the five.

    Predictions of a segmentor with `legacy` are measured as by the original code: in mIoU and mEm an empty prediction
    counts as all animal, since its threshold is twice the mean, which is zero.

    Args:
        output_dir: folder for the predicted masks, black and white, by the names of the images.
        collect_device, prefix: of every metric of mmengine.
    """

    def __init__(self, output_dir: str | None = None, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.output_dir = output_dir

    def process(self, data_batch: dict, data_samples: Sequence[dict[str, Any]]) -> None:
        """Measure the predictions of a batch."""
        for sample in data_samples:
            predicted = sample["pred_sem_seg"]["data"].squeeze(0).cpu().numpy() > 0
            if self.output_dir is not None:
                _write(Path(self.output_dir) / f"{Path(sample['img_path']).stem}.png", predicted)
            truth = sample["gt_sem_seg"]["data"].squeeze(0).cpu().numpy() == 1
            if truth.any():
                self.results.append(measure(predicted, truth, sample.get("legacy", False)))
            else:
                self.results.append({"empty_MAE": float(predicted.mean())})

    def compute_metrics(self, results: list[dict[str, float]]) -> dict[str, float]:
        """Means over all images, rounded to four digits."""
        empty = [result for result in results if "empty_MAE" in result]
        measured = [result for result in results if "mIoU" in result]
        metrics = {name: _mean(measured, name) for name in (measured[0] if measured else {})}
        if empty:
            metrics |= {"empty": len(empty), "empty_MAE": _mean(empty, "empty_MAE")}
        return metrics


def measure(predicted: np.ndarray, truth: np.ndarray, legacy: bool = False) -> dict[str, float]:
    """The five of one image; (H, W) bool each, `truth` not empty."""
    pair = predicted.astype(np.float64), truth
    found = {}
    for name, metric in (
        ("Sm", py_sod_metrics.Smeasure()),
        ("wFm", py_sod_metrics.WeightedFmeasure()),
        ("mEm", py_sod_metrics.Emeasure()),
        ("MAE", py_sod_metrics.MAE()),
    ):
        metric.step(*pair, normalize=False)
        found[name] = metric.get_results()[{"Sm": "sm", "wFm": "wfm", "mEm": "em", "MAE": "mae"}[name]]
    curve = found["mEm"]["curve"]
    found["mEm"] = found["mEm"]["adp"] if legacy else curve[_WHITE]
    if legacy and not predicted.any():
        pair = np.ones_like(pair[0]), truth
    iou = py_sod_metrics.FmeasureV2({"iou": py_sod_metrics.IOUHandler(False, False, with_binary=True)})
    iou.step(*pair, normalize=False)
    found = {"mIoU": iou.get_results()["iou"]["binary"], **found}
    return {name: float(value) for name, value in found.items()}


def _mean(results: Sequence[dict[str, float]], name: str) -> float:
    return round(float(np.mean([result[name] for result in results])), 4)


def _write(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
