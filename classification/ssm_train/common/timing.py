"""The time that work takes where a GPU does it after the call has returned."""

import time
from collections.abc import Callable

import torch


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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


class Every:
    """Whether some seconds have passed: true once after each such time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Count from now on."""
        self._last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._last + self._seconds:
            return False
        self._last = now
        return True
