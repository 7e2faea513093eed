"""Files of `torch.save` as data: tensors, plain values, and stand-ins for what training scripts save beside them.

PyTorch's own restricted unpickler (`weights_only=True`) builds tensors and plain values, and refuses every global it
does not know. It is told here of the few others that official files hold, each as an inert class of ours: a yacs config
becomes a dictionary; a namespace of arguments, NumPy values and mmengine's logs become records of what the file says of
them. None of those packages is imported, and no function that a file names is called.
"""

from __future__ import annotations

import pickle
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class CheckpointError(RuntimeError):
    """A file that cannot be read, or does not fit the model. The message is one line."""


class Record:
    """Stands for an object, or for the result of a call: keeps the arguments and the state given in the file."""

    def __new__(cls, *args: Any) -> Record:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Config:
    """Stands for a yacs node, a dictionary with attributes: only the dictionary is kept."""

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


_STAND_INS = [
    (Config, "yacs.config.CfgNode"),  # "config" of VMamba and VSSD
    (Record, "argparse.Namespace"),  # "args" of Vim
    # "message_hub" of detectors and segmentors: arrays of past losses, and the names of functions on them
    (Record, "mmengine.logging.history_buffer.HistoryBuffer"),
    (Record, "builtins.getattr"),
    # arrays and accuracies
    (Record, "builtins.bytes"),
    (Record, "numpy.dtype"),
    (Record, "numpy.ndarray"),
    *((Record, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
]
_LOCK = threading.Lock()

# What PyTorch raises for a foreign or truncated file, and its unpickler for a senseless order of instructions.
_MALFORMED = (
    *(RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError),
    struct.error,
)


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote to a file, in its present or its former format, on the CPU.

    Raises:
        CheckpointError: not such a file, or one that holds anything but tensors, plain values and what is listed above.
    """
    try:
        with _only(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than weights and plain values: {_reason(error)}") from error
    except _MALFORMED as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint: {reason}") from error


@contextmanager
def _only(allowed: list[tuple[type, str]]) -> Iterator[None]:
    """PyTorch's list of further globals is one per process: entries of others are set aside for the moment."""
    with _LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def _reason(error: pickle.UnpicklingError) -> str:
    """The offending global, out of a message that else advises to trust the file."""
    text = str(error)
    name = re.search(r"GLOBAL (\S+)", text)
    if name:
        return f"{name[1]}, and no code is run from files"
    return text.rpartition("WeightsUnpickler error: ")[2].lstrip().splitlines()[0]
