"""From a config to a network: timm's registry, starting weights, and the wrapper for several processes."""

import difflib
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode as CN

import ssm_models
from classification.checkpoint import META, read_checkpoint
from classification.distributed import World
from classification.errors import UserError


def build_model(cfg: CN) -> nn.Module:
    """Create MODEL.NAME with MODEL.KWARGS on the CPU. UserError for an unknown name or arguments the model refuses.

    Importing `ssm_models` has registered its models; every other name of timm's registry works as well.
    """
    name = cfg.MODEL.NAME
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or [
            "vmamba_tiny_s1l8",
            "vim_tiny_patch16_224",
            "vssd_tiny",
        ]
        raise UserError(f"MODEL.NAME {name!r} is not a registered model; did you mean {' or '.join(near)}?")
    try:
        model = timm.create_model(
            name, num_classes=cfg.MODEL.NUM_CLASSES, drop_path_rate=cfg.MODEL.DROP_PATH_RATE, **cfg.MODEL.KWARGS
        )
    except (TypeError, ValueError) as error:
        if not cfg.MODEL.KWARGS:
            raise
        raise UserError(f"model {name} cannot be built with MODEL.KWARGS {dict(cfg.MODEL.KWARGS)}: {error}") from error
    if cfg.TRAIN.USE_CHECKPOINT:
        model.set_grad_checkpointing(True)
    return model


def load_pretrained(model: nn.Module, path: Path, new_head: bool = False) -> Path:
    """Load weights strictly from a checkpoint folder of ours (the better validated ones), a .safetensors file or an
    official .pth file; with `new_head` all but the classifier, for other classes. Returns the file. UserError says what
    is wrong, naming the first differing keys."""
    if (path / META).is_file():
        path = read_checkpoint(path).weights_file
    if not path.is_file():
        raise UserError(f"--pretrained {path} is neither a checkpoint folder nor a file; give a .safetensors or .pth")
    try:
        ssm_models.load_checkpoint(model, path, which="auto", new_head=new_head)
    except ssm_models.CheckpointError as error:
        raise UserError(str(error).replace("new_head=True keeps", "--new-head keeps")) from error
    return path


def parallel(model: nn.Module, world: World) -> nn.Module:
    """The model that training calls: itself, or averaged over the ranks."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device.index] if world.device.type == "cuda" else None)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_precision(amp: str, device: torch.device) -> None:
    """UserError where the device cannot compute in the precision asked for."""
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16: use --amp fp16 or --amp off")
