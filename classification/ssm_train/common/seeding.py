"""Randomness as a function of (seed, what, where) instead of history.

A sample's augmentation is seeded by (seed, epoch, index, repeat), a training step by (seed, step, rank). Nothing
depends on which worker or process did what before, so the number of workers is free and a resumed run goes on exactly.
"""

import random

import numpy as np
import torch

# keeps the streams of different uses apart; the numbers are part of the reproducibility of published runs
_SAMPLE, _STEP, _ORDER, _INIT = range(4)


def _words(*key: int) -> tuple[int, int, int]:
    """Three independent seeds (64, 32, 64 bits) for python, numpy and torch from non-negative integers."""
    state = np.random.SeedSequence(key).generate_state(3, np.uint64)
    return int(state[0]), int(state[1]) & 0xFFFFFFFF, int(state[2])


def _seed_all(*key: int) -> None:
    for_python, for_numpy, for_torch = _words(*key)
    random.seed(for_python)
    np.random.seed(for_numpy)
    # where CUDA has not begun (in loader workers, on CPUs), torch.manual_seed would queue a seeding of it, with a stack
    # trace, every time
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(for_torch)
    torch.default_generator.manual_seed(for_torch)


def seed_sample(seed: int, epoch: int, index: int, repeat: int) -> None:
    """Seed everything for the augmentation of one sample. What the generators were before is not restored: it would
    cost four times as much, and every use of them begins with its own seed."""
    _seed_all(seed, _SAMPLE, epoch, index, repeat)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed everything for micro-step `step` (counted over the whole run) of one process: mixup, dropout, drop path."""
    _seed_all(seed, _STEP, step, rank)


def seed_init(seed: int) -> None:
    """Seed everything for building the model, alike on all ranks."""
    _seed_all(seed, _INIT)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The permutation of range(count) in which `epoch` visits the training set."""
    generator = torch.Generator().manual_seed(_words(seed, _ORDER, epoch)[2])
    return torch.randperm(count, generator=generator).tolist()
