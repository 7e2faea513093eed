"""Models from the descriptions of the original repositories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch.nn as nn

from ..weights import table
from . import vim, vmamba, vssd

# the part of a yaml's MODEL that says how a model is built
_SECTIONS = {"vmamba": "VSSM", "vssd": "VMAMBA2"}
_BUILDERS = {"vmamba": vmamba.build, "vim": vim.build, "vssd": vssd.build}


def from_upstream(family: str, config: str | Mapping[str, Any], backbone: bool = False) -> nn.Module:
    """Build a model from upstream's own description.

    Args:
        family: "vmamba", "vim" or "vssd".
        config: keyword arguments of upstream's class (with or without the `type` of a detector's config), an upstream
            yaml or its MODEL section, or a published model or yaml name, or the name of a published file. Old names are
            translated, arguments without effect upstream are dropped.
        backbone: the dense form, which gives a tuple of NCHW maps.

    Raises:
        ValueError: an unknown family, name or argument.
    """
    if family not in _BUILDERS:
        raise ValueError(f"family={family!r} is not one of {', '.join(_BUILDERS)}")
    if isinstance(config, str):
        return _BUILDERS[family](_of_file(config), backbone)
    config = dict(config.get("MODEL", config))
    section = _SECTIONS.get(family)
    if section and section not in config and {"TYPE", "NAME"} & config.keys():
        raise ValueError(
            f"this yaml has no MODEL.{section}, the section that says how a {family} is built; it has "
            f"{', '.join(map(str, config))}"
        )
    config.pop("type", None)
    frozen = config.pop("frozen_stages", -1)
    model = _BUILDERS[family](config, backbone)
    if backbone:
        model.freeze(frozen, norm_eval=False)
    return model


def _of_file(name: str) -> str:
    """The name of the model in a published file, of any task; any other name stays."""
    entry = table.of_file(PurePosixPath(name).name)
    return entry.backbone if entry is not None and entry.model else name
