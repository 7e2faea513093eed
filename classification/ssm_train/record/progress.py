"""Where training stands: a bar at the foot of a terminal, plain lines anywhere else."""

import contextlib
import datetime
import logging
import sys
import time
from collections.abc import Callable, Mapping

import rich.progress
from rich.console import Console
from rich.table import Column
from yacs.config import CfgNode as CN

from ssm_train.common.distributed import World
from ssm_train.common.timing import Every

_log = logging.getLogger(__name__)

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 5.0  # between two lines, where steps are no longer than that


class Progress(contextlib.AbstractContextManager):
    """The progress of one run, shown by rank 0 while its `with` block lasts; on other ranks every method does nothing.

    On a terminal the bar stays at the foot and all other output goes above it. log.txt gets the lines in either case.
    `console` is where to draw, by default stdout.
    """

    def __init__(self, world: World, cfg: CN, console: Console | None = None) -> None:
        self._epochs = cfg.TRAIN.EPOCHS
        self._epoch = self._steps = self._done = 0
        self._drawn = 0.0
        self._clock = Every(_LINE_SECONDS)
        self._images, self._since = 0, time.monotonic()  # of the steps since the last line
        # without force_terminal, variables like FORCE_COLOR would bring control characters into files
        console = console or Console(force_terminal=sys.stdout.isatty())
        self._bar: rich.progress.Progress | None = None
        if world.is_main and console.is_terminal and not console.is_dumb_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("epoch {task.description}"),
                rich.progress.BarColumn(bar_width=None),
                # on a narrow terminal the bar gives way, not the numbers
                rich.progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
                rich.progress.TextColumn("{task.fields[values]}"),
                console=console,
                # drawn by `advance`: a thread would hold locks while the loader forks its workers
                auto_refresh=False,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("", total=1, visible=False, values="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Remove the bar; the terminal is as before."""
        if self._bar is not None:
            self._bar.stop()

    def epoch(self, epoch: int, steps: int, start: int) -> None:
        """Begin `epoch` (from 1) of `steps` micro-steps, `start` of which are done."""
        self._epoch, self._steps, self._done = epoch, steps, start
        self._images, self._since = 0, time.monotonic()
        if self._bar is not None:
            name = f"{epoch}/{self._epochs}"
            self._bar.update(self._task, total=steps, completed=start, description=name, visible=True, refresh=True)

    def step(self, images: int, eta: Callable[[], float]) -> None:
        """One more micro-step is done, with so many images of this rank; `eta` says how many seconds are left. Without
        a bar there is a line where none has come for a while."""
        self._done += 1
        self._images += images
        if self._bar is None:
            if self._clock.due():
                now = time.monotonic()
                speed, left = self._images / (now - self._since), datetime.timedelta(seconds=round(eta()))
                place = (self._epoch, self._epochs, self._done, self._steps)
                _log.info("epoch %d/%d [%d/%d] %.1f img/s eta %s", *place, speed, left)
                self._images, self._since = 0, now
            return
        # a finished epoch is shown as such: validation comes next
        if self._done == self._steps or time.monotonic() >= self._drawn + _REDRAW_SECONDS:
            self._bar.update(self._task, completed=self._done, refresh=True)
            self._drawn = time.monotonic()

    def show(self, values: Mapping[str, float]) -> None:
        """What was measured: loss, lr, grad_norm, images_per_second, data_wait (share), eta_seconds, memory_mb."""
        self._clock.reset()
        self._images, self._since = 0, time.monotonic()
        speed = f"{values['images_per_second']:.0f} img/s data {100 * values['data_wait']:.0f}%"
        eta = f"eta {datetime.timedelta(seconds=round(values['eta_seconds']))}"
        if self._bar is not None:
            shown = f"loss {values['loss']:.4f} {speed} {eta}"
            self._bar.update(self._task, completed=self._done, values=shown, refresh=True)
        _log.info(
            "epoch %d/%d [%d/%d] loss %.4f lr %.3g grad %.2f %s %s mem %.0f MB",
            self._epoch,
            self._epochs,
            self._done,
            self._steps,
            values["loss"],
            values["lr"],
            values["grad_norm"],
            speed,
            eta,
            values["memory_mb"],
            extra={"on_bar": self._bar is not None},
        )


class Passing:
    """A line every few seconds for a pass over batches that has no bar: call it once per batch."""

    def __init__(self, what: str, batches: int) -> None:
        self._what, self._batches, self._done = what, batches, 0
        self._clock = Every(_LINE_SECONDS)

    def __call__(self) -> None:
        self._done += 1
        if self._clock.due():
            _log.info("%s [%d/%d]", self._what, self._done, self._batches)
