"""The scans as operators of ONNX Runtime: where the library is, for sessions on files that need it.

    options = onnxruntime.SessionOptions()
    ssm_ops.onnxruntime.register(options)
    session = onnxruntime.InferenceSession("model.onnx", options)

`analyze/export.py --scan custom` writes such files. The library (csrc/onnxruntime) computes in float32 on the CPU, on
the threads of the session, without PyTorch and Python: programs in other languages give its path to ONNX Runtime.
"""

from __future__ import annotations

import ctypes
import importlib.util

from ._built import build_command

BUILD_COMMAND = f"SSM_OPS_BUILD=onnxruntime {build_command()}"
DOMAIN = "ssm_ops"
VERSION = 1
"""Of the operators, as csrc/onnxruntime/runtime.h says. Nodes carry it, and a library refuses those of another one."""


def library_path() -> str:
    """The compiled library.

    Raises:
        RuntimeError: it is not built, cannot be loaded, or is one of other operators than this package's.
    """
    found = importlib.util.find_spec(f"{__package__}._onnxruntime")
    if found is None or found.origin is None:
        raise RuntimeError(f"the library for onnxruntime is not built: {BUILD_COMMAND}")
    check(found.origin)
    return found.origin


def check(path: str) -> None:
    """
    Raises:
        RuntimeError: the library at `path` cannot be loaded, or is one of other operators than this package's.
    """
    try:
        version = ctypes.CDLL(path).ssm_ops_onnxruntime_version
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"the library for onnxruntime at {path} cannot be loaded ({' '.join(str(error).split())}): {BUILD_COMMAND}"
        ) from error
    version.restype = ctypes.c_int64
    if version() != VERSION:
        raise RuntimeError(
            f"the library for onnxruntime at {path} has version {version()} of the operators, this package needs "
            f"{VERSION}: {BUILD_COMMAND}"
        )


def register(session_options) -> None:
    """Let sessions with these `onnxruntime.SessionOptions` know the operators. Raises as `library_path`."""
    session_options.register_custom_ops_library(library_path())
