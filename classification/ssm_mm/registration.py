"""Registers in MMEngine, whose registries mmdet, mmsegmentation and their kin look into, what configs may name:

SSMBackbone           any model of the zoo, see `ssm_mm.backbone` and `ssm_models.dense.DenseBackbone`
SimpleFeaturePyramid  the neck of plain backbones (Vim)
LN2d                  LayerNorm over the channels of maps, in the heads of plain backbones
LayerDecay            optimizer constructor with a rate per layer
"""

from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from timm.layers import LayerNorm2d

from ssm_mm.backbone import SSMBackbone
from ssm_mm.layer_decay import LayerDecay
from ssm_models.layers.simple_fpn import SimpleFeaturePyramid

MODELS.register_module(module=SSMBackbone)
MODELS.register_module(module=SimpleFeaturePyramid)
MODELS.register_module(name="LN2d", module=LayerNorm2d)
OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=LayerDecay)
