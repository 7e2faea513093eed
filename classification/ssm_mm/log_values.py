"""What mmengine saves beside tensors: NumPy numbers and arrays, and the curves of its log.

`ssm_models.unpickle` gives them as records of what the file says. They become values again here, by our own hand: NumPy
would build any array that a file describes, of pointers too.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer

from ssm_models.unpickle import Name, Record

_HISTORY = Name("mmengine.logging.history_buffer.HistoryBuffer")
_STATISTICS = ("min", "max", "current", "mean")
_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


def plain(value: Any) -> Any:
    """`value` with its records made values again; those of no kind known here stay records, which do nothing.

    Raises:
        ValueError: an array of anything but numbers, or a reference to something else than a statistic of a log.
    """
    return _plain(value, {})


def _plain(value: Any, made: dict[int, Any]) -> Any:
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, Mapping):
        result = {name: _plain(each, made) for name, each in value.items()}
    elif type(value) in (list, tuple):
        result = type(value)(_plain(each, made) for each in value)
    elif isinstance(value, Record):
        result = _of_record(value, made)
    else:
        return value
    made[id(value)] = result
    return result


def _of_record(record: Record, made: dict[int, Any]) -> Any:
    kind = record.name.rpartition(".")[2]
    if record.name == _HISTORY.name:
        return _history(_plain(record.state, made))
    if record.name == "builtins.getattr":
        return _statistic(*record.args)
    if kind == "scalar":
        dtype, data = _checked(record.args, Record, object)
        return _numbers(dtype, (), data).item()
    if kind == "_reconstruct":
        _, shape, dtype, by_columns, data = _checked(record.state, int, tuple, Record, (bool, int), object)
        return _numbers(dtype, shape, data, "F" if by_columns else "C")
    return record


def _checked(values: Any, *kinds: Any) -> tuple:
    if type(values) is not tuple or len(values) != len(kinds) or not all(map(isinstance, values, kinds)):
        raise ValueError("a NumPy value that NumPy did not write")
    return values


def _numbers(dtype: Record, shape: tuple, data: Any, order: str = "C") -> np.ndarray:
    name, *_ = dtype.args or (None,)
    byte_order = dtype.state[1] if type(dtype.state) is tuple and len(dtype.state) > 1 else None
    if name not in _NUMBERS or byte_order not in ("<", "|"):
        raise ValueError(f"an array of {name}, not of numbers")
    kind = np.dtype(f"<{name}")
    if not all(type(extent) is int and extent >= 0 for extent in shape) or len(shape) > 32:
        raise ValueError("an array without a shape")
    if not isinstance(data, bytes) or math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"an array of shape {list(shape)} and {name} in other bytes")
    return np.frombuffer(data, kind).reshape(shape, order=order).copy(order)


def _statistic(owner: Any = None, name: Any = None) -> str:
    if owner != _HISTORY or name not in _STATISTICS:
        raise ValueError(f"a reference to {name!r}, which is no statistic of a log")
    return name


def _history(state: Any) -> HistoryBuffer:
    """A curve: its values and how many steps each stands for."""
    state = state if isinstance(state, dict) else {}
    values, counts = state.get("_log_history"), state.get("_count_history")
    length = state.get("_max_length", state.get("max_length"))
    arrays = isinstance(values, np.ndarray) and isinstance(counts, np.ndarray)
    if not arrays or values.ndim != 1 or values.shape != counts.shape or type(length) is not int or length < 1:
        raise ValueError("a curve of a log without values")
    return HistoryBuffer(values, counts, length)
