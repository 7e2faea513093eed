"""Registers in mmdet what our configs name; they list this module under `custom_imports`.

SSMBackbone           any model of the zoo, see `ssm_models.dense.DenseBackbone`
SimpleFeaturePyramid  the neck of plain backbones (Vim)
LN2d                  LayerNorm over the channels of maps, in the heads of plain backbones
LayerDecay            optimizer constructor with a rate per layer
LoadImageFromFile     mmcv's, with the file's name in every error
LoadAnnotations       mmdet's, for annotations without a mask
"""

from mmdet.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS
from timm.layers import LayerNorm2d

from detection.load_annotations import LoadAnnotations
from ssm_mm.layer_decay import LayerDecay
from ssm_mm.load_image import LoadImageFromFile
from ssm_models.dense import DenseBackbone
from ssm_models.layers.simple_fpn import SimpleFeaturePyramid

MODELS.register_module(name="SSMBackbone", module=DenseBackbone)
MODELS.register_module(module=SimpleFeaturePyramid)
MODELS.register_module(name="LN2d", module=LayerNorm2d)
OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=LayerDecay)

TRANSFORMS.register_module(module=LoadAnnotations, force=True)
# of mmdet's own scope, so found before mmcv's
TRANSFORMS.register_module(module=LoadImageFromFile)
