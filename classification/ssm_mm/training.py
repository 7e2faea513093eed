"""Training and testing by mmengine's Runner, with our checks around it."""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from mmengine.config import Config

from ssm_mm.checkpoints import Options, fitting_weights, load_strictly
from ssm_mm.config import training_config
from ssm_mm.fits_model import FitsModel
from ssm_mm.profile import StepProfile, prepare_profile
from ssm_mm.runner import DataRunner, unwrapped
from ssm_train.common.errors import UserError


def run_training(args: argparse.Namespace) -> None:
    """Train as `args` of `command.train_parser` say; with --profile, time some steps instead."""
    cfg = training_config(args)
    if getattr(args, "auto_scale_lr", False):
        cfg.auto_scale_lr.enable = True
    if args.profile:
        prepare_profile(cfg, args.profile)
    with joined_processes(args.launcher):
        runner = DataRunner.from_cfg(cfg)
        if cfg.get("load_from"):
            # mmengine would load what fits and log the rest
            fitting_weights(unwrapped(runner.model), cfg.load_from)
        runner.register_hook(FitsModel())
        if args.profile:
            runner.register_hook(StepProfile(args.profile))
        runner.train()


@contextlib.contextmanager
def joined_processes(launcher: str) -> Iterator[None]:
    """Connect CPU processes, which mmengine cannot: it asks for a CUDA device whatever the backend. GPU processes are
    left to it. UserError for another launcher than torchrun."""
    if launcher == "none" or torch.cuda.is_available():
        yield
        return
    if launcher != "pytorch":
        raise UserError(f"--launcher {launcher} needs GPUs; CPU processes are connected by --launcher pytorch")
    if "RANK" not in os.environ:
        raise UserError("--launcher pytorch, but no launcher is there: start with dist_train.sh or dist_test.sh")
    dist.init_process_group("gloo")
    yield
    dist.barrier()
    # gloo's threads release the tensors of the barrier, for which they need the interpreter
    time.sleep(0.5)
    dist.destroy_process_group()


def run_test(cfg: Config, args: argparse.Namespace) -> dict[str, float]:
    """Evaluate the checkpoint of `args` with a config of `testing_config`; returns the metrics. UserError where it does
    not fit."""
    with joined_processes(cfg.launcher):
        runner = DataRunner.from_cfg(cfg)
        load_strictly(unwrapped(runner.model), args.checkpoint, Options(args.which, args.allow_nonfinite))
        runner.register_hook(FitsModel())
        return runner.test()
