"""Asked to stop: Ctrl-C, SIGTERM (Kubernetes, Slurm, spot machines) and SIGUSR1 (Slurm's early warning) end a run in
order."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

# Windows has the first two
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_WORKERS_GRACE = 60  # seconds
_SAME_PRESS = 1.0  # seconds; a launcher passes on the Ctrl-C that the terminal sends to all processes anyway


def leave_signals_to_trainer(worker: int) -> None:
    """For loader workers (`worker_init_fn`): a batch system signals all processes, and the trainer still needs them to
    finish its step. SIGTERM, which also ends workers that were left behind, takes effect a minute later."""
    for number in _SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # Windows ends processes without asking them
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKERS_GRACE))


class Preempted(Exception):
    """The run has saved and ends, to be continued by --resume auto. Raised on all ranks alike."""


class StopRequest:
    """Whether this process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal = ""
        self._interrupted = 0.0  # when Ctrl-C was pressed first

    def __bool__(self) -> bool:
        return bool(self.signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        if not self._interrupted:
            self._interrupted = time.monotonic()
        elif time.monotonic() > self._interrupted + _SAME_PRESS:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals only set this flag: a step is finished and a checkpoint written before the run ends. Who
        presses Ctrl-C again does not want to wait for that: KeyboardInterrupt."""
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
