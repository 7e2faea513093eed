"""Randomness as a function of (seed, what, where) instead of history.

A sample's augmentation is seeded by (seed, epoch, index, repeat), a training step by (seed, step, rank). Nothing
depends on which worker or process did what before, so the number of workers is free and a resumed run goes on exactly.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# keeps the streams of different uses apart; the numbers are part of the reproducibility of published runs
_SAMPLE, _STEP, _ORDER, _INIT = range(4)


def _words(*key: int) -> tuple[int, int, int]:
    """Three independent seeds (64, 32, 64 bits) for python, numpy and torch from non-negative integers."""
    state = np.random.SeedSequence(key).generate_state(3, np.uint64)
    return int(state[0]), int(state[1]) & 0xFFFFFFFF, int(state[2])


@contextmanager
def sample_rng(seed: int, epoch: int, index: int, repeat: int) -> Iterator[None]:
    """Inside, python, numpy and torch (CPU) draw from the stream of one sample; afterwards all is as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for_python, for_numpy, for_torch = _words(seed, _SAMPLE, epoch, index, repeat)
    random.seed(for_python)
    np.random.seed(for_numpy)
    # torch.manual_seed would also queue a seeding of CUDA, with a stack trace, for every sample of every worker
    torch.default_generator.manual_seed(for_torch)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_all(*key: int) -> None:
    for_python, for_numpy, for_torch = _words(*key)
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)


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
