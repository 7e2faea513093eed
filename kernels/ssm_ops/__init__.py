"""Fast scan operators for vision state-space models. `python -m ssm_ops` tells what runs where."""

from .cross_scan import cross_merge, cross_scan
from .selective_scan import selective_scan
from .ss2d_scan import ss2d_scan

__version__ = "0.1.0"

__all__ = ["cross_merge", "cross_scan", "selective_scan", "ss2d_scan"]
