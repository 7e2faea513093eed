"""From a config to a network: timm's registry, and which parts do not train."""

import difflib

import timm
from timm.models._manipulate import group_with_matcher
from torch import nn
from yacs.config import CfgNode as CN

import ssm_models  # noqa: F401  registers its models
from ssm_train.common.errors import UserError

# the mark of modules that stay in evaluation mode
_FROZEN = "frozen_by_config"


def check_model_name(name: str, key: str) -> None:
    """UserError with close matches where `name`, the value of config `key`, is not in timm's registry."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or [
            "vmamba_tiny_s1l8",
            "vim_tiny_patch16_224",
            "vssd_tiny",
        ]
        raise UserError(f"{key} {name!r} is not a registered model; did you mean {' or '.join(near)}?")


def build_model(cfg: CN) -> nn.Module:
    """Create MODEL.NAME with MODEL.KWARGS on the CPU. UserError for an unknown name or arguments the model refuses.

    Importing `ssm_models` has registered its models; every other name of timm's registry works as well.
    """
    name = cfg.MODEL.NAME
    check_model_name(name, "MODEL.NAME")
    classes = {} if cfg.MODEL.NUM_CLASSES is None else {"num_classes": cfg.MODEL.NUM_CLASSES}
    try:
        model = timm.create_model(name, drop_path_rate=cfg.MODEL.DROP_PATH_RATE, **classes, **cfg.MODEL.KWARGS)
    except (TypeError, ValueError) as error:
        if "drop_path_rate" in str(error):
            raise UserError(f"model {name} has no paths to drop: it cannot be trained here ({error})") from error
        if not cfg.MODEL.KWARGS:
            raise
        raise UserError(f"model {name} cannot be built with MODEL.KWARGS {dict(cfg.MODEL.KWARGS)}: {error}") from error
    if cfg.TRAIN.USE_CHECKPOINT:
        model.set_grad_checkpointing(True)
    return model


def freeze(model: nn.Module, cfg: CN) -> None:
    """Take parts of the network out of training: their parameters get no gradients, and `set_train_mode` keeps them in
    evaluation mode, so that neither statistics of batch norms nor dropped paths move.

    TRAIN.LINEAR_PROBE freezes all but the classifier; TRAIN.FREEZE_STAGES n freezes the stem and the first n - 1 stages
    (of models without stages: blocks), each with its downsampling. UserError where there are fewer.
    """
    if cfg.TRAIN.LINEAR_PROBE:
        head = {id(part) for part in (*model.get_classifier().modules(), *model.get_classifier().parameters())}
        frozen = [part for _, part in _parts(model) if id(part) not in head]
    else:
        frozen = _first_stages(model, cfg.TRAIN.FREEZE_STAGES, cfg.MODEL.NAME)
    for part in frozen:
        if isinstance(part, nn.Parameter):
            part.requires_grad_(False)
        else:
            setattr(part, _FROZEN, True)


def _parts(model: nn.Module) -> list[tuple[str, nn.Module | nn.Parameter]]:
    return [*model.named_modules(), *model.named_parameters()]


def _first_stages(model: nn.Module, count: int, name: str) -> list[nn.Module | nn.Parameter]:
    """Modules and parameters of the first `count` groups: the stem and count - 1 stages."""
    if count == 0:
        return []
    if not hasattr(model, "group_matcher"):
        raise UserError(f"TRAIN.FREEZE_STAGES is {count}, but {name} does not tell its stages: set it to 0")
    parts = dict(_parts(model))
    group = group_with_matcher(((part, None) for part in parts), model.group_matcher(coarse=True), reverse=True)
    most = max(group.values())  # the last group is the classifier
    if count > most:
        raise UserError(
            f"TRAIN.FREEZE_STAGES is {count}, but {name} has a stem and {most - 1} stages: it may be {most} at most"
        )
    return [part for part_name, part in parts.items() if group[part_name] < count]


def set_train_mode(model: nn.Module) -> None:
    """`model.train()`, but for what `freeze` took out of training. `model` may be wrapped (DDP, compile)."""
    model.train()
    for module in model.modules():
        if getattr(module, _FROZEN, False):
            module.training = False


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
