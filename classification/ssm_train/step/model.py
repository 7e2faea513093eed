"""From a config to a network: timm's registry, starting weights, and which parts do not train."""

import difflib
from pathlib import Path
from typing import NamedTuple

import timm
from timm.models._manipulate import adapt_input_conv, group_with_matcher
from torch import nn
from yacs.config import CfgNode as CN

import ssm_models
from ssm_models.weights import is_path
from ssm_train.common.errors import UserError
from ssm_train.config.defaults import channels, replaced
from ssm_train.record.checkpoint import META, read_checkpoint

# how messages of ssm_models call what the command line has flags for
_FLAGS = {"; new_head=True": "; --new-head", "; allow_nonfinite=True": "; --allow-nonfinite"}

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


class Pretrained(NamedTuple):
    """Weights to start from: a checkpoint folder of ours, a .safetensors file, an official .pth file, or a name of the
    table of published weights."""

    path: Path
    which: str = "auto"
    """"model" or "ema"; "auto" takes the set that validated better, of a name the one it is published for."""
    new_head: bool = False
    """All but the classifier, for other classes."""
    allow_nonfinite: bool = False


def load_pretrained(model: nn.Module, weights: Pretrained, option: str = "--pretrained") -> Path:
    """Load weights strictly. Returns the file or name. UserError says what is wrong with the value of `option`, naming
    the first differing keys."""
    path, which = weights.path, weights.which
    if (path / META).is_file():
        path, which = read_checkpoint(path).file_of(which), "auto"
    if is_path(path) and not path.is_file():
        raise UserError(
            f"{option} {path} is neither a checkpoint folder nor a file; give a .safetensors or .pth, or a name that "
            "`python -m ssm_models` lists"
        )
    try:
        ssm_models.load_checkpoint(
            model, path, which=which, new_head=weights.new_head, allow_nonfinite=weights.allow_nonfinite
        )
    except ssm_models.CheckpointError as error:
        message = str(error)
        for argument, flag in _FLAGS.items():
            message, found, rest = message.partition(argument)
            # other options have no such flags
            message += f"{flag}{rest}" if found and option == "--pretrained" else ""
        raise UserError(message) from error
    return path


def start_from(model: nn.Module, cfg: CN, weights: Pretrained) -> Path:
    """`load_pretrained`; a grey network takes the weights of one for RGB, too, with the filters of its first layer
    summed over the colours: for a grey image in RGB they give the same (timm's rule)."""
    try:
        return load_pretrained(model, weights)
    except UserError as error:
        if channels(cfg) == 3:
            raise
        colour = build_model(replaced(cfg, {"MODEL.KWARGS.in_chans": 3}))
        try:
            file = load_pretrained(colour, weights)
        except UserError:
            raise error from None
    own = model.state_dict()
    summed = {
        name: value if value.shape == own[name].shape else adapt_input_conv(channels(cfg), value)
        for name, value in colour.state_dict().items()
    }
    model.load_state_dict(summed)
    return file


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
