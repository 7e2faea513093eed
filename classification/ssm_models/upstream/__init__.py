"""Models from the descriptions of the original repositories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from . import vim, vmamba, vssd

_BUILDERS = {"vmamba": vmamba.build, "vim": vim.build, "vssd": vssd.build}


def from_upstream(family: str, config: str | Mapping[str, Any], backbone: bool = False) -> nn.Module:
    """Build a model from upstream's own description.

    Args:
        family: "vmamba", "vim" or "vssd".
        config: keyword arguments of upstream's class, the MODEL section of an upstream yaml, or a published model or
            yaml name. Old names are translated, arguments without effect upstream are dropped.
        backbone: the dense form, which gives a tuple of NCHW maps.

    Raises:
        ValueError: an unknown family, name or argument.
    """
    if family not in _BUILDERS:
        raise ValueError(f"family={family!r} is not one of {', '.join(_BUILDERS)}")
    return _BUILDERS[family](config, backbone)
