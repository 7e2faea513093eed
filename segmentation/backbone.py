"""Registers in mmsegmentation what our configs name; they list this module under `custom_imports`.

SSMBackbone        any model of the zoo, see `ssm_models.dense.DenseBackbone`
LayerDecay         optimizer constructor with a rate per layer
LoadImageFromFile  mmcv's, with the file's name in every error
"""

from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS

from ssm_mm.layer_decay import LayerDecay
from ssm_mm.load_image import LoadImageFromFile
from ssm_models.dense import DenseBackbone

MODELS.register_module(name="SSMBackbone", module=DenseBackbone)
OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=LayerDecay)
# of mmsegmentation's own scope, so found before mmcv's
TRANSFORMS.register_module(module=LoadImageFromFile)
