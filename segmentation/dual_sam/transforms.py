"""What pipelines of Dual-SAM have beside mmsegmentation's own transforms."""

from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image

from segmentation.dual_sam.gamma import gamma_copy
from ssm_train.common.decode import UNREADABLE
from ssm_train.common.errors import UserError


class GammaCopy(BaseTransform):
    """Image (H, W, 3) uint8 BGR -> (H, W, 6): RGB, and RGB of its gamma copy. It stands before whatever changes the
    image's size, as the gamma is that of the whole image."""

    def transform(self, results: dict) -> dict:
        image = results["img"]
        both = image[..., ::-1], gamma_copy(image)[..., ::-1]
        results["img"] = np.ascontiguousarray(np.concatenate(both, axis=-1))
        return results


class LoadBinaryMask(BaseTransform):
    """Reads `seg_map_path` as (H, W) of 0 and 1, and compares its size with that of the image. Where there is none
    (an image to be predicted only), there is nothing to read."""

    def transform(self, results: dict) -> dict:
        path = results.get("seg_map_path")
        if path is None:
            return results
        mask = read_mask(path)
        if mask.shape != tuple(results["ori_shape"][:2]):
            (height, width), (rows, columns) = mask.shape, results["ori_shape"][:2]
            raise UserError(
                f"mask {path} has {width}x{height} pixels, its image {results['img_path']} {columns}x{rows}: they must "
                "be of one size"
            )
        results["gt_seg_map"] = mask
        results["seg_fields"].append("gt_seg_map")
        return results


def read_mask(path: str | Path) -> np.ndarray:
    """(H, W) uint8, 1 where the animal is.

    Files hold 0 and 1, or grey levels in which 255 is the animal: these are decided at the middle, as edges are often
    smoothed and JPEG blurs. Three equal channels count as one. UserError for anything else, such as numbers of
    classes.
    """
    try:
        with Image.open(path) as file:
            mask = np.asarray(file)
    except UNREADABLE as error:
        raise UserError(f"mask {path} cannot be read: {error}") from error
    if mask.ndim == 3 and (mask[..., :3] == mask[..., :1]).all():
        mask = mask[..., 0]
    if mask.ndim != 2:
        raise UserError(f"mask {path} is in colours: it must be black and white")
    largest = int(mask.max())
    if largest <= 1:
        return mask.astype(np.uint8)
    if not 128 <= largest <= 255:
        raise UserError(
            f"mask {path} has values up to {largest}: it must have 0 and 1, or 0 and 255 (numbers of classes must be "
            "reduced to these)"
        )
    return (mask >= 128).astype(np.uint8)
