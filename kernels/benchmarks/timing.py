"""Measuring in turns, and writing the results: what the benchmarks share."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


class Times(NamedTuple):
    """Seconds of one way to compute something."""

    median: float
    fastest: float
    slowest: float


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done what `run` asks for; the device is idle at the start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turns(runs: dict[Name, Callable[[], object]], repeats: int, device: torch.device) -> dict[Name, Times]:
    """Times of every run. They take turns, so what else happens on the machine hits all; the first turn warms up."""
    taken = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            seconds = timed(run, device)
            if turn > 0:
                taken[name].append(seconds)
    return {name: Times(statistics.median(t), min(t), max(t)) for name, t in taken.items()}


def write_csv(rows: list[dict], columns: tuple[str, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
