"""What our configs of segmentors import: the names that `ssm_mm` registers, and a reader that names the file.

LoadImageFromFile  mmcv's, with the file's name in every error, and `value_range` for images of more than 8 bits
"""

from mmseg.registry import TRANSFORMS

from ssm_mm.load_image import LoadImageFromFile

# of mmsegmentation's own scope, so found before mmcv's
TRANSFORMS.register_module(module=LoadImageFromFile)
