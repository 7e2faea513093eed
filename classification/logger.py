"""What a run leaves to read: console and log.txt, log.jsonl and TensorBoard events."""

import contextlib
import json
import logging
import logging.handlers
import math
import platform
import resource
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import TextIO

import timm
import torch
from torch.utils.tensorboard import SummaryWriter

from classification.fileio import is_disk_full

# distribution name of this repository, when it is installed
_DISTRIBUTION = "vision-ssm"
_ROOT = "classification"


class _FileHandler(logging.FileHandler):
    """A full disk must stop the run with one line, not print a traceback per message."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the error that logging is just handling


class RunLog(contextlib.AbstractContextManager):
    """The log of one run on rank 0, open until its `with` block ends; on other ranks every method does nothing.

    Messages of `logging.getLogger("classification...")` go to the console at once and to log.txt; what comes before
    `open_text` is kept and written then.
    """

    def __init__(self, active: bool) -> None:
        self._active = active
        self._jsonl: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._report_thread = threading.excepthook
        root = logging.getLogger(_ROOT)
        root.propagate = False
        root.setLevel(logging.INFO if active else logging.CRITICAL + 1)
        self._early = logging.handlers.MemoryHandler(capacity=1 << 16, flushLevel=logging.CRITICAL + 1)
        self._handlers: list[logging.Handler] = []
        if active:
            console = logging.StreamHandler(sys.stdout)
            console.setFormatter(logging.Formatter("%(message)s"))
            self._attach(console)
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
        """Write log.jsonl and TensorBoard events into `folder`. A run resumed after `update` updates appends to both,
        and TensorBoard forgets what an interrupted attempt recorded after that."""
        if not self._active:
            return
        path = folder / "log.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._jsonl = open(path, "a", buffering=1)  # noqa: SIM115, closed by close()
        if torn:
            # a killed process left half a line: keep it from spoiling ours
            self._jsonl.write("\n")
        threading.excepthook = self._thread_failed
        self._board = SummaryWriter(str(folder), purge_step=update + 1)

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """No traceback for a full disk: TensorBoard's writer thread keeps that error for our next `record` to raise."""
        if not (isinstance(args.exc_value, OSError) and is_disk_full(args.exc_value)):
            self._report_thread(args)

    def record(self, kind: str, update: int, values: dict[str, float | int | None]) -> None:
        """One line of log.jsonl, {"kind": kind, "update": update, **values}, and the same scalars for TensorBoard.

        Numbers that are not finite become null: JSON has no other way.
        """
        if self._jsonl is None or self._board is None:
            return
        values = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        self._jsonl.write(json.dumps({"kind": kind, "update": update, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, update)

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


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    # a checkout that is not installed has no version
    with contextlib.suppress(metadata.PackageNotFoundError):
        found[_DISTRIBUTION] = metadata.version(_DISTRIBUTION)
    return found


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has used: allocated on a GPU, resident on a CPU, in MB (2**20 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in units of 1024 bytes, macOS in bytes
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
