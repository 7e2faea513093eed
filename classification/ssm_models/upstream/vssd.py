"""VSSD from the descriptions of its original repository: keyword arguments, yaml sections, published names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch.nn as nn

from ..dense import DenseVSSD
from ..vssd import VARIANTS, VSSD

# Published names besides those of the registry: yaml files and checkpoints.
_NAMES = {
    **{f"{variant}_e300": variant for variant in ("vssd_micro", "vssd_tiny", "vssd_small", "vssd_base")},
    "vssd_tiny_na_e300": "vssd_tiny",  # leaves the sign of the weights to its default, which is the same
    "vssd_micro_best": "vssd_micro",
    **{f"{variant}_best_ema": variant for variant in ("vssd_tiny", "vssd_small", "vssd_base")},
    **{f"{variant}_e300_with_mesa": variant for variant in ("vssd_tiny", "vssd_small", "vssd_base")},
    # the second generation, whose base model is that of the first
    **{f"vssd_{size}_mesa": f"vssd_{size}_iccv2025" for size in ("tiny", "small")},
    "vssd_base_iccv2025": "vssd_base",
}

_ARGUMENTS = (
    *("in_chans", "num_classes", "embed_dim", "depths", "num_heads", "attn_types", "mlp_ratio", "drop_rate"),
    *("drop_path_rate", "use_checkpoint", "d_state", "ssd_expansion", "ssd_ngroups", "ssd_chunk_size"),
    *("ssd_positive_dA", "linear_attn_duality", "bidirection", "simple_patch_embed", "simple_downsample"),
    *("rmt_patch_embed", "rmt_downsample", "ssd_linear_norm", "exp_da", "rope"),
)
# Upstream spells an argument in several ways: in capitals in yamls, with and without "ssd_", and these:
_SPELLINGS = {
    **{name.lower().removeprefix("ssd_"): name for name in _ARGUMENTS},
    "positve_da": "ssd_positive_dA",
    "expand": "ssd_expansion",
}
# Arguments whose only value is built in.
_FIXED = {"patch_size": (4,), "norm_layer": ("ln", "LN", nn.LayerNorm), "use_cpe": (True,), "multi_branch": (True,)}
_FIXED |= dict.fromkeys(("zact", "aexp", "norm_da", "ab_bias", "dscale", "res_scale"), (False, None))
# Arguments that do nothing upstream, or say how large images are: here they have any size.
_DEAD = ("cls", "type", "pretrained", "img_size", "image_size", "qkv_bias", "lepe")

# Given in upstream's yamls, but not read there (it takes VMAMBA2's drop path and 1000 classes): meant all the same.
_MODEL_LIVE = ("NUM_CLASSES", "DROP_PATH_RATE")
_MODEL_DEAD = ("TYPE", "NAME", "PRETRAINED", "RESUME", "DROP_RATE", "LABEL_SMOOTHING", "MMCKPT", "FUSED_LAYERNORM")
_MODEL_DEAD += ("IS_PRETRAIN",)


def build(config: str | Mapping[str, Any], backbone: bool = False) -> nn.Module:
    """Build a VSSD from upstream's own description.

    Args:
        config: keyword arguments of upstream's class, the MODEL section of an upstream yaml (with its part VMAMBA2), or
            a published model, yaml or checkpoint name.
        backbone: the dense form, which gives a tuple of NCHW maps.

    Raises:
        ValueError: an unknown name or argument.
    """
    if isinstance(config, str):
        arguments = _published(config)
    elif "VMAMBA2" in config:
        arguments = _from_yaml(config)
    else:
        arguments = _translate(config)
    try:
        return DenseVSSD(**arguments) if backbone else VSSD(**arguments)
    except TypeError as error:
        raise ValueError(f"vssd: {error}") from error


def _published(description: str) -> dict[str, Any]:
    """Arguments of a published name; also of a file's path, and of "Backbone_VMAMBA2 of <name>, ..."."""
    name = re.match(r"(?:\w+ of )?([^,]*)", description).group(1).strip()
    name = PurePosixPath(name).name.removesuffix(".yaml").removesuffix(".pth")
    name = re.sub(r"(?<=_iccv2025)\w+", "", name)  # how these yamls' names go on is not known
    variant = _NAMES.get(name, name)
    if variant not in VARIANTS:
        legal = ", ".join([*VARIANTS, *_NAMES])
        raise ValueError(f"{description!r} is not a published VSSD; known: {legal}")
    return dict(VARIANTS[variant])


def _from_yaml(model: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {}
    for key, value in model.items():
        if key in _MODEL_LIVE:
            arguments[key.lower()] = value
        elif key not in (*_MODEL_DEAD, "VMAMBA2"):
            raise ValueError(f"{key}: {value!r} is not a key of upstream's MODEL section")
    return arguments | _translate(model["VMAMBA2"])


def _translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Upstream's arguments, in any of their spellings, as ours."""
    arguments, of_stages = {}, None
    for name, value in config.items():
        lower = name.lower()
        bare = lower.removeprefix("ssd_")
        if bare in _SPELLINGS:
            arguments[_SPELLINGS[bare]] = value
        elif lower == "out_indices":
            arguments[lower] = value
        elif lower == "async_state":
            of_stages = _states_of_stages(name, value)
        elif bare in _FIXED:
            if value not in _FIXED[bare]:
                raise ValueError(f"{name}={value!r}: VSSD has {_FIXED[bare][0]!r} there and nothing else")
        elif lower not in _DEAD:
            legal = ", ".join(_ARGUMENTS)
            raise ValueError(f"{name}: {value!r} is not an argument of upstream's VMAMBA2; known: {legal}")
    return arguments if of_stages is None else arguments | {"d_state": of_stages}


def _states_of_stages(name: str, value: Any) -> tuple[int, ...] | None:
    """`async_state`: a d_state per stage, in the place of the one for all; None where it is off."""
    if value is None or value is False:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name}={value!r} is not a list of one d_state per stage")
    return tuple(value)
