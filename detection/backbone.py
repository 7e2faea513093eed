"""What our configs of detectors import: the names that `ssm_mm` registers, and readers for mmdet that name the file.

LoadImageFromFile     mmcv's, with the file's name in every error, and `value_range` for images of more than 8 bits
LoadAnnotations       mmdet's, for annotations without a mask
"""

from mmdet.registry import TRANSFORMS

from detection.load_annotations import LoadAnnotations
from ssm_mm.load_image import LoadImageFromFile

TRANSFORMS.register_module(module=LoadAnnotations, force=True)
# of mmdet's own scope, so found before mmcv's
TRANSFORMS.register_module(module=LoadImageFromFile)
