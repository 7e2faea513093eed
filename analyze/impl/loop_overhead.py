"""Updates of the training loop against bare forward, backward and optimizer steps."""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from yacs.config import CfgNode as CN

from analyze.inputs import check_writable, find_device, make_folder, progress
from ssm_train.common.distributed import World
from ssm_train.common.fileio import write_atomic
from ssm_train.common.preemption import StopRequest
from ssm_train.common.timing import timed
from ssm_train.config.defaults import channels
from ssm_train.config.load import load_config
from ssm_train.data.dataset import Batch
from ssm_train.data.samplers import Key
from ssm_train.record.logger import RunLog
from ssm_train.run_folder import RunFolder
from ssm_train.settle import with_own_classes
from ssm_train.start import prepare
from ssm_train.step.engine import Training
from ssm_train.trainer import Trainer

_CONFIG = Path(__file__).parents[2] / "configs" / "classification" / "vmamba" / "vmamba_nano_digits.yaml"


class Overhead(NamedTuple):
    """Milliseconds per update: medians of the bare steps, of the loop, and of the differences of neighbours."""

    bare: float
    loop: float
    difference: float

    @property
    def share(self) -> float:
        """Of the time of a bare step."""
        return self.difference / self.bare


class InMemory(Dataset[Batch]):
    """The same batch `updates` times, with the face of a loader."""

    def __init__(self, batch: Batch, updates: int) -> None:
        self.batch, self.updates_per_epoch = batch, updates
        self.batch_sampler = self.dataset = self

    def set_position(self, epoch: int, update: int) -> None:
        """There is one batch only."""

    def __len__(self) -> int:
        return self.updates_per_epoch

    def __iter__(self):
        return iter([self.batch] * self.updates_per_epoch)

    def name(self, index: int) -> str:
        return f"random image {index}"


def measure(cfg: CN, device: torch.device, updates: int, repeats: int, folder: Path) -> Overhead:
    """Time `repeats` pairs of `updates` bare steps and as many of the loop; its records go to `folder`."""
    world, size = World(0, 1, device), cfg.DATA.IMG_SIZE
    run = prepare(cfg, world, updates)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(cfg.DATA.BATCH_SIZE, channels(cfg), size, size, generator=generator).to(device)
    targets = torch.arange(len(images), device=device) % cfg.MODEL.NUM_CLASSES
    loader = InMemory(Batch(images, targets, [], [Key(0, index) for index in range(len(images))]), updates)
    bare, loop = [], []
    with RunLog(active=False) as log:
        trainer = Trainer(cfg, world, log, RunFolder(folder, 1, {}), run, loader, loader, loader, loader, StopRequest())
        for _ in progress(range(repeats + 1), "pairs of measurements"):
            bare.append(timed(lambda: _bare_steps(run, images, targets, updates), device) / updates)
            loop.append(timed(lambda: _loop(trainer), device) / updates)
    # the first pair warmed up
    bare, loop = bare[1:], loop[1:]
    differences = [one - other for one, other in zip(loop, bare, strict=True)]
    return Overhead(*(1e3 * statistics.median(times) for times in (bare, loop, differences)))


def _bare_steps(run: Training, images: torch.Tensor, targets: torch.Tensor, updates: int) -> None:
    run.network.train()
    for _ in range(updates):
        F.cross_entropy(run.network(images), targets).backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)


def _loop(trainer: Trainer) -> None:
    trainer.position = trainer.position._replace(update=0)
    trainer.train_epoch()


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    check_writable(args.out)
    args.device = find_device(args.device).type
    cfg = with_own_classes(
        load_config(args.cfg or str(_CONFIG), None, {"batch_size": args.batch_size, "device": args.device})
    )
    with tempfile.TemporaryDirectory() as folder:
        result = measure(cfg, torch.device(args.device), args.updates, args.repeats, Path(folder))
    print(
        f"{cfg.MODEL.NAME}, batch {args.batch_size}, {args.device}: bare step {result.bare:.2f} ms, loop "
        f"{result.loop:.2f} ms; the loop adds {result.difference:.2f} ms ({result.share:.1%}; medians of "
        f"{args.repeats} pairs of {args.updates} updates)"
    )
    make_folder(args.out.parent)
    numbers = {"model": cfg.MODEL.NAME, "batch": args.batch_size, "device": args.device}
    write_atomic(args.out, json.dumps(numbers | result._asdict() | {"share": result.share}, indent=1) + "\n")
    print(args.out)
