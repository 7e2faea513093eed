"""Registers in mmsegmentation what configs of Dual-SAM name:

DualSAM, SAMEncoder, BottomNeck, CoupledPrompt, DualConnectivityHead, MaskTTAModel   parts of the model
MarineDataset, GammaCopy, LoadBinaryMask                                            data
MarineMetric, ConnectivityVisualizer                                                results
"""

from mmseg.registry import DATASETS, METRICS, MODELS, TRANSFORMS, VISUALIZERS

from segmentation.dual_sam.dataset import MarineDataset
from segmentation.dual_sam.head import BottomNeck, DualConnectivityHead
from segmentation.dual_sam.metric import MarineMetric
from segmentation.dual_sam.prompt import CoupledPrompt
from segmentation.dual_sam.sam import SAMEncoder
from segmentation.dual_sam.segmentor import DualSAM
from segmentation.dual_sam.transforms import GammaCopy, LoadBinaryMask
from segmentation.dual_sam.tta import MaskTTAModel
from segmentation.dual_sam.visualizer import ConnectivityVisualizer

for part in (DualSAM, SAMEncoder, BottomNeck, CoupledPrompt, DualConnectivityHead, MaskTTAModel):
    MODELS.register_module(module=part)
for transform in (GammaCopy, LoadBinaryMask):
    TRANSFORMS.register_module(module=transform)
DATASETS.register_module(module=MarineDataset)
METRICS.register_module(module=MarineMetric)
VISUALIZERS.register_module(module=ConnectivityVisualizer)
