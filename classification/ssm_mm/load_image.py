"""mmcv's reading of images, which names the file when it fails."""

import cv2
import mmcv.transforms
from mmengine.fileio import get

from ssm_train.common.errors import UserError


class LoadImageFromFile(mmcv.transforms.LoadImageFromFile):
    """Grey, alpha, palette and 16-bit files become 8-bit BGR, as OpenCV does. UserError for what is no image."""

    def transform(self, results: dict) -> dict | None:
        try:
            return super().transform(results)
        except (cv2.error, AssertionError, OSError) as error:
            raise UserError(_reason(results["img_path"])) from error


def _reason(path: str) -> str:
    try:
        size = len(get(path))
    except OSError as error:
        return f"image {path} cannot be read: {error.strerror}"
    if size == 0:
        return f"image {path} is an empty file: restore it or take it out of the annotations"
    return f"image {path} of {size} bytes is damaged or of no format that OpenCV reads: restore it or take it out"
