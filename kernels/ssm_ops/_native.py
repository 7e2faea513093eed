"""The compiled libraries: plain C interfaces (csrc/cpu, csrc/cuda), called through ctypes, so they fit every torch.

A library is used only if what it says of itself is what _interface.py says: one that was built before an update of the
sources would read its arguments from wrong places.
"""

from __future__ import annotations

import ctypes
import importlib.util

import torch  # noqa: F401  before the libraries: they share its OpenMP (same soname), so there is one pool of threads

from ._built import build_command
from ._interface import AGREED


class _Agreement(ctypes.Structure):
    """`Agreement` of buffers.h."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_int64)]


BUILD_COMMAND = build_command()


def load(path: str, agreed: dict[str, int]) -> tuple[ctypes.CDLL | None, str | None]:
    """The library at `path`, or None and why it cannot be used.

    Args:
        agreed: what it has to say of itself, numbers by name.
    """
    try:
        loaded = ctypes.CDLL(path)
    except OSError as error:
        return None, f"at {path} cannot be loaded ({' '.join(str(error).split())})"
    if not hasattr(loaded, "ssm_ops_abi"):
        return None, f"at {path} is stale (older than ssm_ops_abi)"
    loaded.ssm_ops_abi.restype = ctypes.POINTER(_Agreement)
    said = {}
    for entry in loaded.ssm_ops_abi() or ():  # a pointer, so the last entry must end it
        if entry.name is None:
            break
        said[entry.name.decode()] = entry.value
    for name in {**agreed, **said}:
        if said.get(name) != agreed.get(name):
            return None, f"at {path} is stale ({name} is {said.get(name)}, these sources need {agreed.get(name)})"
    return loaded, None


def _find(name: str) -> str | None:
    found = importlib.util.find_spec(f"{__package__}._{name}")
    return None if found is None else found.origin


def _say(name: str, problem: str) -> str:
    return f"the {name} library {problem}: SSM_OPS_BUILD={name} {BUILD_COMMAND}"


PATHS = {name: _find(name) for name in AGREED}
"""Of the libraries, None where one is not built."""

# At import, which takes a millisecond: a compiler that traces the choice of an implementation must not meet it.
_LOADED = {name: (None, "is not built") if path is None else load(path, AGREED[name]) for name, path in PATHS.items()}

PROBLEMS = {name: None if problem is None else _say(name, problem) for name, (_, problem) in _LOADED.items()}
"""Why a library cannot be used, with the command that mends it; None for those that can."""


def call(library: str, function: str, arguments: ctypes.Structure | ctypes.c_int64) -> None:
    """Run a function of a library.

    Raises:
        MemoryError: there was none for its buffers.
        RuntimeError: the library is not there, refused the arguments, or did not start; says why.
    """
    if PROBLEMS[library] is not None:  # a program that was exported elsewhere names its implementation
        raise RuntimeError(f"{function}: {PROBLEMS[library]}")
    run = getattr(_LOADED[library][0], function)
    run.restype = ctypes.c_char_p  # null, or what went wrong
    problem = run(ctypes.byref(arguments))
    if problem is not None:
        problem = f"{function}: {problem.decode()}"
        raise MemoryError(problem) if ": no memory" in problem else RuntimeError(problem)
