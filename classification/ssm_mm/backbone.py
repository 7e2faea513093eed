"""`ssm_models.dense.DenseBackbone` as configs of the OpenMMLab packages name it, with their habits in mind."""

import difflib
import inspect
from collections.abc import Collection
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, Registry

from ssm_mm.config_parts import type_name
from ssm_models import vim, vssd, vssm
from ssm_models.checkpoint import CheckpointError
from ssm_models.dense import Dense, DenseBackbone, DenseVisionMamba, DenseVSSD, DenseVSSM
from ssm_train.common.errors import UserError

_FAMILIES = {DenseVSSM: vssm.VARIANTS, DenseVSSD: vssd.VARIANTS, DenseVisionMamba: vim.VARIANTS}
_OURS = tuple(inspect.signature(DenseBackbone).parameters)
# what backbones of the packages and the original repositories call it
_THEIRS = {
    "with_cp": "use_checkpoint",
    "pretrained": "checkpoint",
    "type": "name",
    "arch": "name",
    "model_name": "name",
    "drop_path": "drop_path_rate",
    "in_channels": "in_chans",
}
# the original repositories' classes, and a model that their users may mean
_ORIGINALS = {
    "MM_VSSM": "vmamba_tiny_s1l8",
    "MM_VSSD": "vssd_tiny",
    "VisionMambaSeg": "vim_tiny_patch16_224",
    "VisionMambaDet": "vim_tiny_patch16_224",
}


def SSMBackbone(**arguments: Any) -> Dense:  # a class to its users
    """A `DenseBackbone`, as which it is documented. `init_cfg`, of all backbones of mmengine, may be None.

    Raises:
        UserError: an argument that it has not, with what ours is called; whatever else `DenseBackbone` refuses.
    """
    if arguments.get("init_cfg") is None:
        arguments.pop("init_cfg", None)
    _check(arguments)
    try:
        backbone = DenseBackbone(**arguments)
    except (ValueError, TypeError, CheckpointError) as error:
        raise UserError(f"SSMBackbone: {error}") from error
    # mmengine initialises what it has built, over the weights of `checkpoint`, unless it is told that this is done
    backbone.is_init = True
    return backbone


def _check(arguments: dict[str, Any]) -> None:
    family = next((family for family, names in _FAMILIES.items() if arguments.get("name") in names), None)
    of_family = _arguments_of(family) - set(_OURS) if family else set()
    unknown = [name for name in arguments if name not in _OURS]
    complaints = [_explain(name, _OURS, of_family, "belongs into model_args") for name in unknown]
    inner = [name for name in arguments.get("model_args") or {} if family and name not in of_family]
    complaints += [f"model_args: {_explain(name, of_family, _OURS, 'stands beside model_args')}" for name in inner]
    if not complaints:
        return
    # as ResNet's, where a config changes the type of the backbone that it inherits
    inherited = "; _delete_=True beside type leaves out what the base config has" if len(unknown) > 1 else ""
    raise UserError(f"SSMBackbone: {'; '.join(complaints)}{inherited}")


def _explain(name: str, here: Collection[str], there: Collection[str], belongs: str) -> str:
    """What is wrong with an argument that is none of those `here`, and what is meant."""
    if name == "init_cfg":
        return "init_cfg must be None: weights are named by checkpoint=FILE"
    ours = _THEIRS.get(name, name)
    if ours in here:
        return f"{name} is called {ours} here"
    if ours in there:
        return f"{name} {belongs}" + (f", as {ours}" if ours != name else "")
    near = difflib.get_close_matches(name, [*here, *there], n=1, cutoff=0.7)
    return f"there is no argument {name}" + (f"; did you mean {near[0]}?" if near else "")


def _arguments_of(family: type) -> set[str]:
    """Of a family's constructor and its bases', as these pass the rest on."""
    signatures = [inspect.signature(base.__init__).parameters.values() for base in family.__mro__[:-1]]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for each in signatures for parameter in each if parameter.kind in named} - {"self"}


def is_ours(backbone: dict) -> bool:
    """Whether a part of a config is an SSMBackbone."""
    return type_name(backbone) == "SSMBackbone"


def check_backbone_type(cfg: Config) -> None:
    """UserError for a backbone that the framework does not know, with what is meant."""
    kind = cfg.get("model", {}).get("backbone", {}).get("type")
    with MODELS.switch_scope_and_registry(None) as registry:  # the framework's, as when the model is built
        if not isinstance(kind, str) or _is_registered(kind, registry):
            return
        known = {*registry.module_dict, *MODELS.module_dict}
    zoo = [name for names in _FAMILIES.values() for name in names]
    model = kind if kind in zoo else _ORIGINALS.get(kind)
    near = difflib.get_close_matches(kind, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    if model:
        meant = f'; here it is type="SSMBackbone", name="{model}"'
    raise UserError(f"model.backbone.type {kind} is registered neither here nor by the config's custom_imports{meant}")


def _is_registered(kind: str, registry: Registry) -> bool:
    try:
        return registry.get(kind) is not None
    except RuntimeError:  # mmengine's answer to most of what it does not know
        return False
