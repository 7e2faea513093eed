"""What the training loop costs beside the model: its updates against bare forward, backward and optimizer steps.

    python analyze/loop_overhead.py [--cfg FILE] [--batch-size 128] [--updates 8] [--repeats 40]

Both train the configured model on the same random images, held in memory, in turns. The loop does all that a run does
(seeding, mixing, clipping, averaging, checks, records) but reading images and checkpoints: reading overlaps with
training in worker processes, and its rest is the data-wait share of a run's report.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from yacs.config import CfgNode as CN

from ssm_train.common.command import run
from ssm_train.common.distributed import World
from ssm_train.common.preemption import StopRequest
from ssm_train.common.timing import timed
from ssm_train.config.defaults import channels
from ssm_train.config.load import load_config
from ssm_train.data.dataset import Batch
from ssm_train.data.samplers import Key
from ssm_train.record.logger import RunLog
from ssm_train.settle import with_own_classes
from ssm_train.start import prepare
from ssm_train.step.engine import Training
from ssm_train.trainer import Trainer

_CONFIG = Path(__file__).parents[1] / "configs" / "classification" / "vmamba" / "vmamba_nano_digits.yaml"


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
        trainer = Trainer(cfg, world, log, folder, run, loader, loader, loader, StopRequest())
        for _ in range(repeats + 1):
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


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/loop_overhead.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--cfg", default=str(_CONFIG), metavar="FILE")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--updates", type=int, default=8, help="per measurement")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    def command() -> None:
        cfg = with_own_classes(load_config(args.cfg, None, {"batch_size": args.batch_size, "device": args.device}))
        with tempfile.TemporaryDirectory() as folder:
            result = measure(cfg, torch.device(args.device), args.updates, args.repeats, Path(folder))
        print(
            f"{cfg.MODEL.NAME}, batch {args.batch_size}, {args.device}: bare step {result.bare:.2f} ms, loop "
            f"{result.loop:.2f} ms; the loop adds {result.difference:.2f} ms ({result.share:.1%}; medians of "
            f"{args.repeats} pairs of {args.updates} updates)"
        )

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
