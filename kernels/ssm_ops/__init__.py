"""Fast scan operators for vision state-space models. `python -m ssm_ops` tells what runs where."""

from ._flops import flop_formulas, register_flop_formulas
from ._fvcore import fvcore_handles
from ._library import is_transformed, no_autocast, runs_eagerly
from .add_norm import add_norm
from .bidirectional_scan import bidirectional_scan
from .causal_conv1d import causal_conv1d
from .cross_scan import cross_merge, cross_scan
from .depthwise_conv import depthwise_conv
from .nc_ssd import nc_ssd
from .selective_scan import selective_scan
from .silu_gate import silu_gate
from .ss2d_scan import ss2d_scan
from .ssd import ssd_chunk_scan

__version__ = "0.1.0"

__all__ = [
    "add_norm",
    "bidirectional_scan",
    "causal_conv1d",
    "cross_merge",
    "cross_scan",
    "depthwise_conv",
    "flop_formulas",
    "fvcore_handles",
    "is_transformed",
    "nc_ssd",
    "no_autocast",
    "register_flop_formulas",
    "runs_eagerly",
    "selective_scan",
    "silu_gate",
    "ss2d_scan",
    "ssd_chunk_scan",
]
