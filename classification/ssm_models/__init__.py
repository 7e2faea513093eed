"""Vision state-space models, registered in timm on import: `timm.create_model("vmamba_tiny_s1l8")`."""

from .checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from .dense import DenseVisionMamba, DenseVSSD, DenseVSSM
from .upstream import from_upstream
from .vim import VisionMamba
from .vssd import VSSD
from .vssm import VSSM

__all__ = [
    "VSSD",
    "VSSM",
    "CheckpointError",
    "DenseVSSD",
    "DenseVSSM",
    "DenseVisionMamba",
    "VisionMamba",
    "from_upstream",
    "load_checkpoint",
    "read_checkpoint",
]
