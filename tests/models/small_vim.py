"""A Vim for tests of a second."""

from ssm_models.vim import VisionMamba
from tests.models.golden import fill_model

SMALL = {"img_size": 64, "depth": 2, "embed_dim": 32, "num_classes": 5, "drop_path_rate": 0.0}


def small(**kwargs) -> VisionMamba:
    """Two blocks over 4x4 patches, filled with numbers."""
    return fill_model(VisionMamba(**(SMALL | kwargs)))
