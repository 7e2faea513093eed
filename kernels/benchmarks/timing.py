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
