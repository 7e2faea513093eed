"""What a run leaves to read: console and log.txt, log.jsonl, summary.csv, TensorBoard events, Weights & Biases."""

import contextlib
import logging
import logging.handlers
import secrets
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import yaml
from termcolor import colored
from torch.utils.tensorboard import SummaryWriter

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import finite, is_disk_full, write_atomic
from ssm_train.common.preemption import Preempted
from ssm_train.record.series import Entry, Summary, as_line, entries_until, read_entries

_ROOT = "ssm_train"


class _Console(logging.StreamHandler):
    """Prints to what sys.stdout is at the moment: a progress bar puts itself there, to print above itself. Records
    marked `on_bar` are left out: the bar shows the same."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(_console_format())
        self.addFilter(lambda record: not getattr(record, "on_bar", False))

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def _console_format() -> logging.Formatter:
    """The bare message; where termcolor finds that colours are wanted (a terminal, NO_COLOR, FORCE_COLOR), time and
    place in front of it in colour, as in Swin's trainer."""
    head = colored("[%(asctime)s %(name)s]", "green") + colored("(%(filename)s %(lineno)d)", "yellow")
    if not head.startswith("\x1b"):
        return logging.Formatter("%(message)s")
    return logging.Formatter(f"{head}: %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


class _FileHandler(logging.FileHandler):
    """A full disk must stop the run with one line, not print a traceback per message."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the error that logging is just handling


class RunLog(contextlib.AbstractContextManager):
    """The log of one run on rank 0, open until its `with` block ends; on other ranks every method does nothing.

    Messages of `logging.getLogger("ssm_train...")` go to the console at once and to log.txt; what comes before
    `open_text` is kept and written then. With `wandb_project`, records also go to that project of Weights & Biases;
    UserError where the package is missing.
    """

    def __init__(self, active: bool, wandb_project: str = "") -> None:
        self._active = active
        self._project = wandb_project
        self._wandb = _import_wandb(wandb_project) if active and wandb_project else None
        self._tracked: Any = None  # the run of Weights & Biases
        self._jsonl: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._summary: Summary | None = None
        self._summary_path = Path()
        self._report_thread = threading.excepthook
        root = logging.getLogger(_ROOT)
        root.propagate = False
        root.setLevel(logging.INFO if active else logging.CRITICAL + 1)
        self._early = logging.handlers.MemoryHandler(capacity=1 << 16, flushLevel=logging.CRITICAL + 1)
        self._handlers: list[logging.Handler] = []
        if active:
            self._attach(_Console())
            self._attach(self._early)

    def _attach(self, handler: logging.Handler) -> None:
        logging.getLogger(_ROOT).addHandler(handler)
        self._handlers.append(handler)

    def open_text(self, folder: Path) -> None:
        """Write log.txt into `folder`, appending to an earlier one."""
        if not self._active:
            return
        file = _FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._early.setTarget(file)
        self._early.flush()
        self._early.setTarget(None)
        logging.getLogger(_ROOT).removeHandler(self._early)
        self._attach(file)

    def open_series(self, folder: Path, update: int) -> None:
        """Write log.jsonl, summary.csv and TensorBoard events into `folder`, which holds config.yaml.

        A run resumed after `update` updates goes on in all of them. What an interrupted attempt recorded after that is
        forgotten, and so is the line it left unfinished: curves never double back. (Weights & Biases cannot forget.)
        Raises UserError where Weights & Biases do not start.
        """
        if not self._active:
            return
        path = folder / "log.jsonl"
        entries = entries_until(read_entries(path), update) if path.exists() else []
        text = "".join(map(as_line, entries))
        if path.exists() and path.read_bytes() != text.encode():
            write_atomic(path, text)
        self._jsonl = open(path, "a", buffering=1)  # noqa: SIM115, closed by close()
        self._summary = Summary(entries)
        self._summary_path = folder / "summary.csv"
        write_atomic(self._summary_path, self._summary.csv())
        threading.excepthook = self._thread_failed
        self._board = SummaryWriter(str(folder), purge_step=update + 1)
        if self._wandb is not None:
            self._tracked = _tracked_run(self._wandb, self._project, folder)

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """No traceback for a full disk: TensorBoard's writer thread keeps that error for our next `record` to raise."""
        if not (isinstance(args.exc_value, OSError) and is_disk_full(args.exc_value)):
            self._report_thread(args)

    def record(self, kind: str, update: int, values: Mapping[str, float | int | str | None]) -> None:
        """One line of log.jsonl, {"kind": kind, "update": update, **values}, and the same scalars for TensorBoard and
        Weights & Biases; of the kind "val", also a line of summary.csv.

        Numbers that are not finite become null: JSON has no other way. Text stays in log.jsonl.
        """
        if self._jsonl is None or self._board is None or self._summary is None:
            return
        entry: Entry = finite({"kind": kind, "update": update, **values})
        self._jsonl.write(as_line(entry))
        scalars = {f"{kind}/{name}": entry[name] for name in values if isinstance(entry[name], int | float)}
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, update)
        if self._tracked is not None:
            self._tracked.log({"update": update, **scalars})
        self._summary.add(entry)
        if kind == "val":
            write_atomic(self._summary_path, self._summary.csv())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Flush and close everything."""
        root = logging.getLogger(_ROOT)
        for closing in [*self._handlers, self._jsonl, self._board]:
            if isinstance(closing, logging.Handler):
                root.removeHandler(closing)
            # while another error is on its way, a full disk that strikes again must not take its place
            with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
                if closing is not None:
                    closing.close()
        threading.excepthook = self._report_thread
        if self._tracked is not None:
            self._tracked.finish(exit_code=0 if error is None or isinstance(error, Preempted) else 1)


def _import_wandb(project: str) -> ModuleType:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(
            f"config WANDB names the project {project!r}, but {error.name} is not installed: pip install wandb, or set "
            "WANDB to ''"
        ) from error
    return wandb


def _tracked_run(wandb: ModuleType, project: str, folder: Path) -> Any:
    """Start the run of Weights & Biases, or go on with the one whose id `folder` keeps."""
    kept = folder / "wandb_id.txt"
    if not kept.exists():
        write_atomic(kept, secrets.token_hex(4) + "\n")
    try:
        run = wandb.init(
            project=project,
            id=kept.read_text().strip(),
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=yaml.safe_load((folder / "config.yaml").read_text()),
            # log.txt has it, and wrapping the console would spoil the progress bar
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases did not start for the project {project!r} ({error}): run `wandb login`, set "
            "WANDB_MODE=offline, or set WANDB to ''"
        ) from error
    # not its own step, which may not go back: a run that rolls back does
    run.define_metric("update")
    run.define_metric("*", step_metric="update")
    return run
