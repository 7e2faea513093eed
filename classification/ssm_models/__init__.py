"""Vision state-space models. Importing them registers the models in timm (`timm.create_model("vmamba_tiny_s1l8")`) and
the costs of their operators in PyTorch's `FlopCounterMode`.
"""

from ssm_ops import register_flop_formulas

from .blocks import NCSSD, SS2D, Mamba, VSSBlock
from .checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from .dense import DenseBackbone, DenseVisionMamba, DenseVSSD, DenseVSSM
from .fvcore_counter import fvcore_handles
from .inference import for_inference
from .model_card import ModelCard, model_card
from .plain_layers import plain_layers
from .upstream import from_upstream
from .vim import VisionMamba
from .vssd import VSSD
from .vssm import VSSM

__all__ = [
    "NCSSD",
    "SS2D",
    "VSSD",
    "VSSM",
    "CheckpointError",
    "DenseBackbone",
    "DenseVSSD",
    "DenseVSSM",
    "DenseVisionMamba",
    "Mamba",
    "ModelCard",
    "VSSBlock",
    "VisionMamba",
    "for_inference",
    "from_upstream",
    "fvcore_handles",
    "load_checkpoint",
    "model_card",
    "plain_layers",
    "read_checkpoint",
]

register_flop_formulas()
