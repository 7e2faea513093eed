"""VMamba from the descriptions of its original repository: keyword arguments, yaml sections, published names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch.nn as nn

from ..dense import DenseVSSM
from ..layers.forward_type import mixer_family, parse_forward_type
from ..vssm import VARIANTS, VSSM
from .vmamba_forward_types import present_forward_type
from .vmamba_variants import FURTHER_VARIANTS

# Published names besides those of the registry: yaml files, the NAMEs inside them, and files of weights.
_NAMES = {
    "vmambav0_tiny_224": "vanilla_vmamba_tiny",
    "vmambav0_small_224": "vanilla_vmamba_small",
    "vmambav0_base_224": "vanilla_vmamba_base",
    "vssm_tiny": "vanilla_vmamba_tiny",
    "vssm_small": "vanilla_vmamba_small",
    "vssm_base": "vanilla_vmamba_base",
    "vssm_tiny_224": "vanilla_vmamba_tiny",
    "vssm_small_224": "vanilla_vmamba_small",
    "vssm_base_224": "vanilla_vmamba_base",
    "vmambav2_tiny_224": "vmamba_tiny_s2l5",
    "vmambav2_small_224": "vmamba_small_s2l15",
    "vmambav2_base_224": "vmamba_base_s2l15",
    "vssm1_tiny_0230": "vmamba_tiny_s2l5",
    "vssm1_small_0229": "vmamba_small_s2l15",
    "vssm1_base_0229": "vmamba_base_s2l15",
    "vmambav2v_tiny_224": "vmamba_tiny_s1l8",
    "vmambav2v_small_224": "vmamba_small_s1l20",
    "vmambav2v_base_224": "vmamba_base_s1l20",
    "vssm1_tiny_0230s": "vmamba_tiny_s1l8",
    "vssm1_small_0229s": "vmamba_small_s1l20",
    "vssm1_base_0229s": "vmamba_base_s1l20",
    "vssmtiny_dp01": "vanilla_vmamba_tiny",
    "vssmsmall_dp03": "vanilla_vmamba_small",
    "vssmbase_dp05": "vanilla_vmamba_base",
    "vssmbase_dp06": "vanilla_vmamba_base",
    "vssm_tiny_0230": "vmamba_tiny_s2l5",
    "vssm_small_0229": "vmamba_small_s2l15",
    "vssm_base_0229": "vmamba_base_s2l15",
}

_YAML_KEYS = {
    "PATCH_SIZE": "patch_size",
    "IN_CHANS": "in_chans",
    "DEPTHS": "depths",
    "EMBED_DIM": "dims",
    "SSM_D_STATE": "ssm_d_state",
    "SSM_RATIO": "ssm_ratio",
    "SSM_DT_RANK": "ssm_dt_rank",
    "SSM_ACT_LAYER": "ssm_act_layer",
    "SSM_CONV": "ssm_conv",
    "SSM_CONV_BIAS": "ssm_conv_bias",
    "SSM_DROP_RATE": "ssm_drop_rate",
    "SSM_INIT": "ssm_init",
    "SSM_FORWARDTYPE": "forward_type",
    "MLP_RATIO": "mlp_ratio",
    "MLP_ACT_LAYER": "mlp_act_layer",
    "MLP_DROP_RATE": "mlp_drop_rate",
    "PATCH_NORM": "patch_norm",
    "NORM_LAYER": "norm_layer",
    "DOWNSAMPLE": "downsample_version",
    "PATCHEMBED": "patchembed_version",
    "POSEMBED": "posembed",
    "GMLP": "gmlp",
    # of February 2024
    "D_STATE": "ssm_d_state",
    "DT_RANK": "ssm_dt_rank",
    "SSM_SIMPLE_INIT": "ssm_simple_init",
}
# Upstream's yaml defaults where they differ from the constructor's.
_YAML_DEFAULTS = {"patchembed_version": "v2", "downsample_version": "v2", "forward_type": "v2"}
_DEAD_YAML_KEYS = ("SSM_RANK_RATIO", "SCAN")
_MODEL_YAML_KEYS = {"NUM_CLASSES": "num_classes", "DROP_PATH_RATE": "drop_path_rate"}
_MODEL_DEAD_YAML_KEYS = (
    "TYPE",
    "NAME",
    "PRETRAINED",
    "RESUME",
    "DROP_RATE",
    "LABEL_SMOOTHING",
    "MMCKPT",
    "IS_PRETRAIN",
)

# Arguments that do nothing upstream.
_DEAD = ("cls", "ssm_rank_ratio", "pretrained")
# Arguments that variants ignore upstream and refuse here.
_DEAD_IN_V0 = ("ssm_act_layer", "ssm_conv", "ssm_conv_bias", "ssm_init")
_DEAD_IN_XV = ("ssm_act_layer",)


def build(config: str | Mapping[str, Any], backbone: bool = False) -> nn.Module:
    """Build a VMamba from upstream's own description.

    Args:
        config: keyword arguments of upstream's class, the MODEL section of an upstream yaml, or a published model or
            yaml name. Old names are translated, arguments without effect upstream are dropped.
        backbone: the dense form, which gives a tuple of NCHW maps.

    Raises:
        ValueError: an unknown name or argument.
    """
    if isinstance(config, str):
        arguments = _published(config)
    elif "VSSM" in config:
        arguments = _from_yaml(config)
    else:
        arguments = {name: value for name, value in config.items() if name not in _DEAD}
    _to_present_arguments(arguments)
    try:
        return DenseVSSM(**arguments) if backbone else VSSM(**arguments)
    except TypeError as error:
        raise ValueError(f"vmamba: {error}") from error


def _published(description: str) -> dict[str, Any]:
    """Arguments of a published name; also of a file's path, and of "Backbone_VSSM of <name>, ..."."""
    name = re.match(r"(?:\w+ of )?([^,]+)", description).group(1).strip()
    name = PurePosixPath(name).name.removesuffix(".yaml")
    name = re.sub(r"_ckpt_epoch_\d+(\.pth)?$", "", name)
    variants = VARIANTS | FURTHER_VARIANTS
    variant = _NAMES.get(name, name)
    if variant not in variants:
        legal = ", ".join([*variants, *_NAMES])
        raise ValueError(f"{description!r} is not a published VMamba; known: {legal}")
    return dict(variants[variant])


def _from_yaml(model: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(_YAML_DEFAULTS)
    sections = (
        (model, _MODEL_YAML_KEYS, (*_MODEL_DEAD_YAML_KEYS, "VSSM")),
        (model["VSSM"], _YAML_KEYS, _DEAD_YAML_KEYS),
    )
    for section, known, dead in sections:
        for key, value in section.items():
            if key in known:
                arguments[known[key]] = value
            elif key not in dead:
                raise ValueError(f"{key}: {value!r} is not a key of upstream's MODEL section")
    return arguments


def _to_present_arguments(arguments: dict[str, Any]) -> None:
    """Replace former arguments and names by today's, and drop what the variant ignores upstream; in place."""
    if arguments.pop("ssm_simple_init", False):
        arguments["ssm_init"] = "v1"
    name = present_forward_type(
        arguments.get("forward_type", "v2"),
        has_conv=arguments.get("ssm_conv", 3) > 1,
        softmax=arguments.pop("softmax_version", False),
    )
    arguments["forward_type"] = name
    family = mixer_family(name)
    dead = _DEAD_IN_XV if family == "xv" else ()
    if family == "v" and parse_forward_type(name).fixed:
        dead = _DEAD_IN_V0
    for argument in dead:
        arguments.pop(argument, None)
