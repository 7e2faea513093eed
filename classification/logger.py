"""What a run leaves to read: console and log.txt, log.jsonl, summary.csv, TensorBoard events, Weights & Biases."""

import contextlib
import csv
import functools
import io
import json
import logging
import logging.handlers
import math
import platform
import resource
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import timm
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from classification.errors import UserError
from classification.fileio import is_disk_full, write_atomic
from classification.preemption import Preempted

# distribution name of this repository, when it is installed
_DISTRIBUTION = "vision-ssm"
_ROOT = "classification"

# {"kind": "train", "val" or "event", "update": optimizer updates made, and what was recorded}
Entry = dict[str, Any]

_VAL = ("top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "seconds")
_COLUMNS = ("epoch", "update", "lr", "train_loss", *_VAL[:-1], "images_per_second", "data_wait", "seconds")


class _Console(logging.StreamHandler):
    """Prints to what sys.stdout is at the moment: a progress bar puts itself there, to print above itself. Records
    marked `on_bar` are left out: the bar shows the same."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("%(message)s"))
        self.addFilter(lambda record: not getattr(record, "on_bar", False))

    @property
    def stream(self) -> TextIO:
        return sys.stdout


class _FileHandler(logging.FileHandler):
    """A full disk must stop the run with one line, not print a traceback per message."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the error that logging is just handling


class RunLog(contextlib.AbstractContextManager):
    """The log of one run on rank 0, open until its `with` block ends; on other ranks every method does nothing.

    Messages of `logging.getLogger("classification...")` go to the console at once and to log.txt; what comes before
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
        file = _FileHandler(folder / "log.txt")
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
        text = "".join(map(_line, entries))
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
        entry: Entry = {"kind": kind, "update": update, **{name: _jsonable(value) for name, value in values.items()}}
        self._jsonl.write(_line(entry))
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


def _jsonable(value: float | int | str | None) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(entry: Entry) -> str:
    return json.dumps(entry) + "\n"


def read_entries(path: Path) -> list[Entry]:
    """The entries of a log.jsonl, in the order of writing; lines that killed processes left unfinished are left out."""
    entries = []
    for line in path.read_bytes().splitlines():
        # also UnicodeDecodeError: after a crash of the machine, a file may end in anything
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def entries_until(entries: list[Entry], update: int) -> list[Entry]:
    """`entries` without those at the end that were recorded after a checkpoint of `update` updates had been written.

    Only those at the end: a run that rolled back counts some updates twice, and both times belong to its history. But
    where the checkpoint is the one rolled back to, neither is part of it.
    """
    end = len(entries)
    while end and (
        entries[end - 1]["update"] > update
        or (entries[end - 1].get("what") == "rolled_back" and entries[end - 1]["update"] == update)
    ):
        end -= 1
    return entries[:end]


class Summary:
    """summary.csv: a row for every validated epoch, made of the entries of log.jsonl."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.rows: dict[int, Entry] = {}  # by epoch
        self._train: list[Entry] = []
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Take up an entry; one of the kind "val" completes the row of its epoch."""
        if entry["kind"] == "train":
            if self._train and entry["epoch"] != self._train[-1]["epoch"]:
                self._train = []
            self._train.append(entry)
        elif entry["kind"] == "val":
            lr = self._train[-1]["lr"] if self._train else None
            measured = {name: entry.get(name) for name in _VAL}
            means = train_means(self._train)
            self.rows[entry["epoch"]] = {
                "epoch": entry["epoch"],
                "update": entry["update"],
                "lr": lr,
                **means,
                **measured,
            }
            self._train = []

    def csv(self) -> str:
        """The file's text; what was not measured is left blank."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[epoch] for epoch in sorted(self.rows))
        return text.getvalue()


def train_means(entries: Iterable[Entry]) -> dict[str, float | None]:
    """Means over entries of the kind "train", of one epoch or more: "train_loss" over iterations, "images_per_second"
    and "data_wait" (share) over time. None where there is nothing to average.

    Each entry stands for the iterations since the one before; where one was repeated, the last one counts.
    """
    by_place = {(entry["epoch"], entry["iteration"]): entry for entry in entries}
    before = (0, 0)
    losses, time, waited, steps = [], 0.0, 0.0, 0
    for (epoch, iteration), entry in sorted(by_place.items()):
        part = iteration - (before[1] if before[0] == epoch else 0)
        before = (epoch, iteration)
        if entry["loss"] is not None:
            losses.append((part, entry["loss"]))
        # in units of the time for one image per iteration
        time += part / entry["images_per_second"]
        waited += entry["data_wait"] * part / entry["images_per_second"]
        steps += part
    counted = sum(part for part, _ in losses)
    return {
        "train_loss": sum(part * loss for part, loss in losses) / counted if counted else None,
        "images_per_second": steps / time if time else None,
        "data_wait": waited / time if time else None,
    }


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


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    # a checkout that is not installed has no version
    with contextlib.suppress(metadata.PackageNotFoundError):
        found[_DISTRIBUTION] = metadata.version(_DISTRIBUTION)
    commit = _commit()
    return {**found, "commit": commit} if commit else found


@functools.cache
def _commit() -> str:
    """The commit of the checkout, with "-dirty" when files differ from it; "" where this is none or git is missing."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        # installed: a repository around it would be another one
        return ""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has used: allocated on a GPU, resident on a CPU, in MB (2**20 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in units of 1024 bytes, macOS in bytes
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
