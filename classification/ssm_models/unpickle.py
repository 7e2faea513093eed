"""Files of `torch.save` as data: tensors, plain values, and stand-ins for what training scripts save beside them.

No module is imported and no function called because a file says so: every name that a file may use is listed here,
with a function of ours. A yacs config becomes a dictionary; a namespace of arguments, NumPy values and mmengine's logs
become records of what the file says of them. Nothing of PyTorch's process-wide settings for loading is used or changed.

A file is gone through twice. The first time its tensors are only compared with the storages they lie in; the second
time they are made.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .file_kinds import foreign_kind
from .pickle_machine import Call, Malformed, Name, Record, Refused, check_key
from .printable import printable
from .torch_file import STORAGES, Storage, TorchFile, open_torch_file

__all__ = ["CheckpointError", "Name", "Record", "read_pickle"]

_MAX_DIMENSIONS = 64  # of a tensor, in PyTorch


class CheckpointError(RuntimeError):
    """A file that cannot be read, or does not fit the model. The message is one line of at most `limit` printable
    characters, however long and odd the names in a file are; line ends and escape sequences are shown escaped."""

    def __init__(self, message: str, limit: int = 300) -> None:
        line = printable(message.strip())
        if len(line) > limit:
            line = f"{line[: limit * 2 // 3]} ... {line[-limit // 3 + 5 :]}"
        super().__init__(line)


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote to a file, in its present or its former format, on the CPU.

    Raises:
        CheckpointError: not such a file, or one that holds anything but tensors, plain values and what is listed below.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        kind = foreign_kind(file, path.suffix)
        if kind:
            raise CheckpointError(f"{path} is damaged or no checkpoint: {kind}")
        try:
            with open_torch_file(file) as opened:
                opened.unpickle(_calls(_checked))
                return opened.unpickle(_calls(_Tensors(opened).make))
        except Refused as error:
            raise CheckpointError(f"{path} holds more than weights and plain values: {error}") from error
        except Malformed as error:
            raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error


# ---- tensors ----


def _checked(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Storage:
    """The typed storage of a tensor that lies within it and uses none of its elements twice over; else Malformed."""
    if not isinstance(storage, Storage):
        raise Malformed("it has a tensor without a storage")
    own = storage.dtype or dtype
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise Malformed("it has a tensor without a shape")
    if own is None or len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
        raise Malformed("it has a tensor of no kind")
    count, length = storage.nbytes // own.itemsize, math.prod(size)
    if math.prod(filter(None, size)) >= 1 << 63:
        raise Malformed(f"it has a tensor of shape {list(size)}")
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) if length else 0
    # a stride of 0 or overlapping rows make a tensor of any size out of a few bytes
    if last >= max(count, 1) or length > count:
        raise Malformed(f"it has a tensor of shape {list(size)} with strides {list(stride)} in {count} elements")
    return Storage(storage.key, own, count)


class _Tensors:
    """Tensors of a file; those of one storage share their memory, as when they were saved."""

    def __init__(self, file: TorchFile) -> None:
        self._file = file
        self._filled: dict[str, Tensor] = {}

    def make(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Any:
        found = _checked(storage, offset, size, stride, dtype)
        if found.dtype in _QUANTIZED:
            return Record("torch.Tensor", (size,))
        if 0 in size:
            return torch.empty(size, dtype=found.dtype)
        if found.key not in self._filled:
            self._filled[found.key] = self._file.fill(found)
        elements = self._filled[found.key][: found.nbytes].view(found.dtype)
        return elements.as_strided(size, stride, offset)


_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)


# ---- names ----

# what is kept as the file says it
_RECORDS = [
    "argparse.Namespace",  # "args" of Vim
    # "message_hub" of detectors and segmentors: arrays of past losses, and the names of functions on them
    *("mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"),
    # arrays and accuracies
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    # tensors that are no weights
    *("torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
    *("torch.per_tensor_affine", "torch.per_channel_affine"),
    *(
        f"torch._utils._rebuild_{kind}"
        for kind in (
            *("sparse_tensor", "qtensor", "nested_tensor", "meta_tensor_no_storage"),
            *("device_tensor_from_numpy", "device_tensor_from_cpu_tensor", "wrapper_subclass"),
        )
    ),
]
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def _calls(tensor: Callable[..., Any]) -> dict[str, Call | None]:
    """What is done for each name that a file may mention: a function of ours, or None for a `Record`."""

    def rebuild(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> Any:
        return tensor(storage, offset, size, stride)

    def rebuild_with_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> Any:
        if not isinstance(dtype, Name) or dtype.name not in _DTYPES:
            raise Malformed("it has a tensor of no kind")
        return tensor(storage, offset, size, stride, _DTYPES[dtype.name])

    def rebuild_subclass(function, kind, arguments, state) -> Any:
        if function != Name("torch._utils._rebuild_tensor_v2"):
            return Record("torch._tensor._rebuild_from_type_v2", (function, kind, arguments, state))
        return rebuild(*arguments)

    copied = _Copies()
    return {
        **dict.fromkeys((*_RECORDS, *_DTYPES, *STORAGES)),
        "torch._utils._rebuild_tensor": rebuild,
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_tensor_v3": rebuild_with_dtype,
        "torch._tensor._rebuild_from_type_v2": rebuild_subclass,
        "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, requires_grad, hooks, state: data,
        "torch.Size": lambda size: size,
        "collections.OrderedDict": copied.ordered,
        "collections.Counter": copied.counter,
        "yacs.config.CfgNode": lambda: OrderedDict(),  # "config" of VMamba and VSSD
        "builtins.set": copied.set,
        "builtins.bytes": lambda: b"",
        "builtins.bytearray": lambda data=b"": data,
        "builtins.complex": lambda real, imaginary: complex(real, imaginary),
        "_codecs.encode": copied.encode,
    }


class _Copies:
    """Calls that copy their argument. Each value is copied once, however often a file asks for it, so that all of them
    together are no longer than the file."""

    def __init__(self) -> None:
        self._encoded: dict[int, tuple[str, bytes]] = {}  # by id, with what keeps the id
        self._taken: dict[int, Any] = {}

    def encode(self, text: str, encoding: str) -> bytes:
        """Bytes, as the protocol of Python 2 stores them."""
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise Malformed("its pickle encodes something else than text as latin-1")
        if id(text) not in self._encoded:
            self._encoded[id(text)] = text, text.encode("latin-1")
        return self._encoded[id(text)][1]

    def ordered(self, pairs: list = ()) -> OrderedDict:
        """As Python 2 stores it, a list of pairs; else empty, and filled later."""
        return OrderedDict((check_key(key), value) for key, value in self._take(pairs))

    def counter(self, counts: dict = ()) -> OrderedDict:
        return OrderedDict(self._take(counts, dict).items())

    def set(self, values: list = ()) -> set:
        return set(map(check_key, self._take(values)))

    def _take(self, values: Any, kind: type = list) -> Any:
        if not values:
            return kind()
        if type(values) is not kind or id(values) in self._taken:
            raise Malformed(f"its pickle makes a container of a {type(values).__name__}, or twice of the same")
        self._taken[id(values)] = values
        return values
