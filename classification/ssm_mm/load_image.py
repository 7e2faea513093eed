"""mmcv's reading of images, which names the file when it fails and knows what the values of more than 8 bits mean."""

import os
from collections.abc import Sequence

import cv2
import mmcv.transforms
import numpy as np
from mmengine.fileio import get

from ssm_train.common.decode import UNREADABLE, Decoder, check_header, check_size, deep_kind
from ssm_train.common.errors import UserError


class LoadImageFromFile(mmcv.transforms.LoadImageFromFile):
    """Grey, alpha and palette files become 8-bit BGR, as OpenCV does. UserError for what is no image.

    Args:
        value_range: (low, high), the values of black and white in images of more than 8 bits a channel, which are then
            read as by `ssm_train.common.decode.Decoder`. Without it they are refused: OpenCV keeps the high bytes of 16
            bits, so that 12-bit data are nearly black, and makes floats constant. With color_type="unchanged" they
            keep their values, whatever they are.
        kwargs: mmcv's.
    """

    def __init__(self, value_range: Sequence[float] | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
            raise UserError(f"value_range {value_range} of LoadImageFromFile is not (low, high) with low < high")
        channels = 1 if self.color_type == "grayscale" else 3
        self._decoder = Decoder(channels, value_range and tuple(value_range), "value_range")

    def transform(self, results: dict) -> dict | None:
        path = results["img_path"]
        try:
            if os.path.exists(path):
                # a pipe, whose reading would never end, or a file too large to be an image
                check_size(os.stat(path).st_size if os.path.isfile(path) else -1)
            data = get(path, backend_args=self.backend_args)
            check_header(data)
            if self.color_type == "unchanged" or not deep_kind(data):
                return super().transform(results)
        except ValueError as error:
            raise UserError(f"image {path} cannot be read: {error}") from error
        except (cv2.error, AssertionError, OSError) as error:
            if self.ignore_empty:
                return None
            raise UserError(_reason(path)) from error
        try:
            image = np.asarray(self._decoder(data))
        except UNREADABLE as error:
            raise UserError(
                f"image {path} cannot be read: {error}; value_range is an argument of LoadImageFromFile in the "
                "config's pipelines"
            ) from error
        image = np.ascontiguousarray(image[..., ::-1]) if image.ndim == 3 else image.copy()
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


def _reason(path: str) -> str:
    try:
        size = len(get(path))
    except OSError as error:
        return f"image {path} cannot be read: {error.strerror}"
    if size == 0:
        return f"image {path} is an empty file: restore it or take it out of the annotations"
    return f"image {path} of {size} bytes is damaged or of no format that OpenCV reads: restore it or take it out"
