"""How the benchmarks measure time: in turns on the CPU, by triton.testing.do_bench on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


class Times(NamedTuple):
    """Seconds of one way to compute something."""

    median: float
    fastest: float
    slowest: float


def measure(runs: dict[Name, Callable[[], object]], turns: int, device: torch.device) -> dict[Name, Times]:
    """Times of every run.

    On the CPU they take turns, so what else happens on the machine hits all; the first turn warms up. On a GPU each is
    repeated for a tenth of a second after its warm-up, with nothing left in the cache of the GPU by the run before.
    """
    if device.type == "cuda":
        from triton.testing import do_bench  # there is no triton where there is no CUDA

        return {
            name: Times(*(1e-3 * t for t in do_bench(run, quantiles=[0.5, 0.0, 1.0]))) for name, run in runs.items()
        }
    taken = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                taken[name].append(time.perf_counter() - start)
    return {name: Times(statistics.median(t), min(t), max(t)) for name, t in taken.items()}


CALLS = 20  # a GPU's queue holds a thousand launches; a call makes a few


def host_seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """What a call takes of the host until it returns, the GPU's work not waited for: Python, PyTorch and the launches.

    Where a call's time on the GPU is less, the host sets the pace. None on the CPU, where both are one.
    """
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize(device)  # an empty queue, so that no launch waits for room in it
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return taken / CALLS
