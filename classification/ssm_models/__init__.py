"""Vision state-space models, registered in timm on import: `timm.create_model("vmamba_tiny_s1l8")`."""

from .checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from .dense import DenseVSSM
from .upstream import from_upstream
from .vssm import VSSM

__all__ = ["VSSM", "CheckpointError", "DenseVSSM", "from_upstream", "load_checkpoint", "read_checkpoint"]
