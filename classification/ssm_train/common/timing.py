"""The time that work takes where a GPU does it after the call has returned."""

import time
from collections.abc import Callable

import torch


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    action: Callable[[], object], device: torch.device, times: int = 1, clock: Callable[[], float] | None = None
) -> float:
    """Seconds of `action`, done so many `times`, until an idle `device` is idle again."""
    clock = clock or time.perf_counter
    wait(device)
    start = clock()
    for _ in range(times):
        action()
    wait(device)
    return clock() - start
