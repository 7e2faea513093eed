"""From a command line to a config that can run here: file, options, device, folders, data."""

import argparse
import os
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from ssm_mm.backbone import check_backbone_type, is_ours
from ssm_mm.checkpoints import newest_readable, read_to_resume
from ssm_mm.data_check import check_data, set_data_root
from ssm_mm.packages import require
from ssm_models.weights import is_path
from ssm_train.common.errors import UserError

_PACKAGES = {"mmdet": "mmdet", "mmseg": "mmsegmentation"}


def read_config(path: str, options: dict | None = None) -> Config:
    """The config in a file, or of a package ("mmdet::swin/..."), with its modules imported. UserError for a missing or
    broken file, or such options."""
    package, _, _ = path.rpartition("::")
    if package and package not in _PACKAGES:
        raise UserError(f"config {path}: {package} is none of {', '.join(_PACKAGES)}")
    if package:
        require(_PACKAGES[package])
    elif not Path(path).is_file():
        raise UserError(f"config {path} does not exist: give a file of configs/, or mmdet::FILE of the package's own")
    # mmengine would install missing packages with whatever pip is on the path
    os.environ.setdefault("PIP_REQUIRE_VIRTUALENV", "1")
    try:
        cfg = get_config(path) if package else Config.fromfile(path)
        cfg.merge_from_dict(options or {})
    except (SyntaxError, KeyError, TypeError, ValueError, ImportError, FileNotFoundError) as error:
        # of custom_imports that fail, mmengine tells at length where it looked, and inside which failed, but not why
        reason = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        why = f" ({reason.__context__})" if isinstance(reason.__context__, ImportError) else ""
        raise UserError(f"config {path} cannot be read: {reason}{why}") from error
    init_default_scope(cfg.get("default_scope", "mmengine"))
    check_backbone_type(cfg)
    if not torch.cuda.is_available():
        _prepare_for_cpu(cfg)
    return cfg


def _prepare_for_cpu(cfg: Config) -> None:
    if cfg.get("env_cfg", {}).get("dist_cfg", {}).get("backend") == "nccl":
        cfg.env_cfg.dist_cfg.backend = "gloo"
    if cfg.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
        cfg.optim_wrapper.type = "OptimWrapper"
        cfg.optim_wrapper.pop("loss_scale", None)
        print("no GPU: the mixed precision of this config is switched off")
    # the default names a CUDA device
    cfg.setdefault(
        "model_wrapper_cfg",
        {
            "type": "MMDistributedDataParallel",
            "device_ids": None,
            "broadcast_buffers": False,
            "find_unused_parameters": cfg.get("find_unused_parameters", False),
        },
    )
    # PyTorch synchronises batch norms on GPUs only
    if _replace_sync_bn(cfg.model):
        print("no GPU: SyncBN of this config is computed as BN, by every process on its own images")


def _replace_sync_bn(node: object) -> int:
    """How many there were."""
    if isinstance(node, ConfigDict):
        own = node.get("type") == "SyncBN"
        if own:
            node.type = "BN"
        return own + sum(_replace_sync_bn(value) for value in node.values())
    return sum(_replace_sync_bn(value) for value in node) if isinstance(node, (list, tuple)) else 0


def training_config(args: argparse.Namespace) -> Config:
    """The config of a training: output, precision, start. UserError before anything is built."""
    cfg = read_config(args.config, args.cfg_options)
    _set_common(cfg, args)
    if args.amp:
        if not torch.cuda.is_available():
            raise UserError("--amp: this PyTorch sees no CUDA device, and mmengine's mixed precision needs one")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    cfg.resume = args.resume is not None
    if args.resume == "auto":
        newest = newest_readable(Path(cfg.work_dir))
        cfg.load_from, cfg.resume = (str(newest), True) if newest else (cfg.get("load_from"), False)
    elif args.resume:
        read_to_resume(args.resume)
        cfg.load_from = args.resume
    if not cfg.get("load_from"):
        _check_backbone_weights(cfg, args.from_scratch)
    check_data(cfg, ("train", "val"))
    return cfg


def testing_config(args: argparse.Namespace) -> Config:
    """The config of a test; the caller loads the checkpoint."""
    cfg = read_config(args.config, args.cfg_options)
    _set_common(cfg, args)
    cfg.load_from = None
    leave_out_backbone_weights(cfg)
    if args.show or args.show_dir:
        cfg.default_hooks.visualization.update(draw=True, show=args.show, wait_time=args.wait_time, interval=1)
    check_data(cfg, ("test",))
    return cfg


def leave_out_backbone_weights(cfg: Config) -> None:
    """For a model that is loaded as a whole."""
    cfg.model.backbone.update({key: None for key in ("checkpoint", "init_cfg") if key in cfg.model.backbone})


def _set_common(cfg: Config, args: argparse.Namespace) -> None:
    cfg.launcher = args.launcher
    if args.data_root:
        set_data_root(cfg, args.data_root)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    if cfg.get("visualizer"):
        # mmengine keeps one per name, with the folder of the first
        cfg.visualizer.name = cfg.work_dir


def _check_backbone_weights(cfg: Config, from_scratch: bool) -> None:
    backbone = cfg.model.backbone
    if not is_ours(backbone):
        return
    checkpoint = backbone.get("checkpoint")
    if checkpoint is None and not from_scratch:
        raise UserError(
            f"the backbone {backbone.get('name')} has no weights: --cfg-options model.backbone.checkpoint=FILE names a "
            "classifier's, --from-scratch trains without"
        )
    if checkpoint is not None and is_path(checkpoint) and not Path(checkpoint).is_file():
        raise UserError(f"model.backbone.checkpoint {checkpoint} does not exist")
