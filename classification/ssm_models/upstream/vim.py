"""Vim from the descriptions of its original repository: keyword arguments and published names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch.nn as nn

from ..dense import DenseVisionMamba
from ..vim import VARIANTS, VisionMamba

_SUFFIX = "_bimambav2_final_pool_mean_abs_pos_embed_with_mid"
# Published names besides those of the registry: entry points of the original code, repositories and files of weights.
_NAMES = {
    f"vim_tiny_patch16_224{_SUFFIX}clstok_div2": "vim_tiny_patch16_224",
    f"vim_tiny_patch16_stride8_224{_SUFFIX}clstok_div2": "vim_tiny_patch16_stride8_224",
    f"vim_small_patch16_224{_SUFFIX}clstok_div2": "vim_small_patch16_224",
    f"vim_small_patch16_stride8_224{_SUFFIX}clstok_div2": "vim_small_patch16_stride8_224",
    f"vim_base_patch16_224{_SUFFIX}dle_cls_token_div2": "vim_base_patch16_224",
    "Vim-tiny-midclstok": "vim_tiny_patch16_224",
    "Vim-small-midclstok": "vim_small_patch16_224",
    "Vim-base-midclstok": "vim_base_patch16_224",
    "vim_t_midclstok_76p1acc": "vim_tiny_patch16_224",
}

# A published file that is no model of the zoo: as its authors say, both streams are rotated and the class token stands
# before the patches. The size of the file agrees with that: so many parameters, and tables of rotations.
_FURTHER = {
    "vim_tiny_73p1": {"embed_dim": 192, "if_rope": True, "if_rope_residual": True, "use_middle_cls_token": False},
}

# Arguments that do nothing upstream, or choose between equal computations, or say how weights are drawn.
_DEAD = ("fused_add_norm", "ft_seq_len", "initializer_cfg", "device", "dtype", "pretrained", "pretrained_cfg", "cls")
# timm's, swallowed there; and misspelled in the published base model, where it does nothing: the default says the same.
_DEAD += ("drop_block_rate", "if_devide_out")
_RENAMED = {"channels": "in_chans"}
# The same of the mixers' arguments: how step sizes are drawn, and a choice of kernel (the slow one is one-way).
_DEAD_OF_MIXERS = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "layer_idx")
_DEAD_OF_MIXERS += ("device", "dtype")


def build(config: str | Mapping[str, Any], backbone: bool = False) -> nn.Module:
    """Build a Vim from upstream's own description.

    Args:
        config: keyword arguments of upstream's VisionMamba (VisionMambaSeg with `backbone`), or a published name.
        backbone: the dense form, which gives a tuple of NCHW maps.

    Raises:
        ValueError: an unknown name or argument.
    """
    if isinstance(config, str):
        arguments = _published(config)
    else:
        arguments = {_RENAMED.get(name, name): value for name, value in config.items() if name not in _DEAD}
        if arguments.get("ssm_cfg"):
            mixers = arguments["ssm_cfg"].items()
            arguments["ssm_cfg"] = {name: value for name, value in mixers if name not in _DEAD_OF_MIXERS}
    if backbone:
        arguments.pop("if_cls_token", None)  # upstream removes the token again
    try:
        return DenseVisionMamba(**arguments) if backbone else VisionMamba(**arguments)
    except TypeError as error:
        raise ValueError(f"vim: {error}") from error


def _published(description: str) -> dict[str, Any]:
    """Arguments of a published name, also of a file's path."""
    name = PurePosixPath(description).name.removesuffix(".pth")
    variants, variant = VARIANTS | _FURTHER, _NAMES.get(name, name)
    if variant not in variants:
        raise ValueError(f"{description!r} is not a published Vim; known: {', '.join([*variants, *_NAMES])}")
    return dict(variants[variant])
