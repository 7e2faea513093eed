"""GPU implementations are used after they were found right on the device at hand: once, and remembered.

Nobody has all GPUs, drivers and compilers. So before "auto" takes a compiled or Triton kernel on a CUDA device for the
first time, another process runs it on small problems beside the reference (_self_check.py), with a limit of time. The
verdict is kept in the user's cache, for this device, driver, torch, triton and code; a change of any of them
asks again. What failed is not used, with one warning that says why.

The environment variable SSM_OPS_SELF_CHECK: "1" (default) as described, "0" trusts everything, "always" asks anew in
every process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from . import _native

VARIABLE = "SSM_OPS_SELF_CHECK"
POLICIES = ("0", "1", "always")
CHECKED_IMPLS = ("cuda", "triton")
VERDICT = "self-check: "  # begins the line of the process that checks
SECONDS = 300  # for one pair; Triton compiles a dozen kernels for some operators
AGAIN = "`python -m ssm_ops --check` asks again"

_LOG = logging.getLogger("ssm_ops")


def policy() -> str:
    value = os.environ.get(VARIABLE, "1")
    if value not in POLICIES:
        raise ValueError(f"{VARIABLE}={value!r} is not one of {', '.join(POLICIES)}")
    return value


# ---- what a verdict holds for ---------------------------------------------------------------------------------------


@functools.cache
def _digest(impl: str) -> str:
    """Of the code that would run: the compiled library, and all sources of this package."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    library = _native.PATHS.get(impl)
    digest = hashlib.sha256()
    for path in [*sources, *([Path(library)] if library else [])]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    """Of NVIDIA's kernel module where the system tells it, and the CUDA version it serves."""
    kernel_module = Path("/proc/driver/nvidia/version")
    named = kernel_module.read_text().split("\n")[0].strip() if kernel_module.is_file() else "driver"
    return f"{named}, CUDA {torch._C._cuda_getDriverVersion()}"


def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def identity(impl: str, index: int) -> str:
    """Device, driver, torch, triton and code, as one line."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    parts = (_device_name(index), _driver(), f"torch {torch.__version__}", f"triton {triton}", f"code {_digest(impl)}")
    return " | ".join(parts)


# ---- what is remembered ---------------------------------------------------------------------------------------------


def verdict_file(who: str, pair: str) -> Path:
    """One for each verdict, so that processes that write at the same time need not wait for each other."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(f"{who} | {pair}".encode()).hexdigest()[:32]
    return Path(root) / "ssm_ops" / "self_check" / f"{name}.json"


def remembered(operator: str, impl: str, index: int) -> tuple[bool, str | None]:
    """Is there a verdict, and what is wrong by it. A file that cannot be read, or says other things, counts as none."""
    who, pair = identity(impl, index), f"{operator}:{impl}"
    try:
        held = json.loads(verdict_file(who, pair).read_text())
    except (OSError, ValueError, RuntimeError) as error:  # the last: this user has no home
        _LOG.debug("no verdict on %s: %s", pair, error)
        return False, None
    if not isinstance(held, dict) or (held.get("identity"), held.get("pair")) != (who, pair):
        return False, None
    fault = held.get("fault", 0)
    return fault is None or isinstance(fault, str), fault


def _remember(who: str, pair: str, fault: str | None) -> None:
    try:
        path = verdict_file(who, pair)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"identity": who, "pair": pair, "fault": fault}, indent=1))
        part.replace(path)
    except (OSError, RuntimeError) as error:  # the latter: this user has no home
        warnings.warn(
            f"ssm_ops: the verdict of the self-check cannot be kept ({error}), so every process checks again: set "
            f"XDG_CACHE_HOME to a folder that can be written, or {VARIABLE}=0",
            RuntimeWarning,
            stacklevel=2,
        )


# ---- asking ---------------------------------------------------------------------------------------------------------


def _command() -> list[str]:
    return [sys.executable, "-m", f"{__package__}._self_check"]


def ask(device: str, pair: str, seconds: float = SECONDS) -> tuple[str | None, bool]:
    """Check "operator:impl" on a device in another process.

    Returns:
        What is wrong (None: nothing), and whether that may pass: no memory, or a device that another process holds.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), VARIABLE: "0"}
    environment.pop("SSM_OPS_IMPL", None)
    if not sys.executable:
        return "no process can be started to check it: sys.executable names no Python", True
    try:
        done = subprocess.run(
            [*_command(), device, pair],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"it hangs: no result within {seconds:g} s", False
    except OSError as error:
        return f"no process can be started to check it: {error}", True
    for line in done.stdout.splitlines():  # what else is printed comes from other libraries
        if done.returncode == 0 and line.startswith(VERDICT):
            verdict = json.loads(line.removeprefix(VERDICT))
            return verdict["fault"], verdict["passing"]
    if done.returncode < 0:  # killed: by the system where memory ends
        name = signal.Signals(-done.returncode).name
        return f"it ended its process by {name}", name == "SIGKILL"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"its process ended with exit status {done.returncode}: {last}", False


def check(operator: str, impl: str, device: torch.device, seconds: float = SECONDS) -> str | None:
    """Ask, and remember the verdict on a GPU implementation. What is wrong, None if nothing."""
    pair = f"{operator}:{impl}"
    fault, passing = ask(str(device), pair, seconds)
    if device.type == "cuda" and impl in CHECKED_IMPLS and not passing:
        _remember(identity(impl, device.index or 0), pair, fault)
    return fault


def probe(index: int) -> str | None:
    """None if the compiled library has code for CUDA device `index` and its driver, else what the driver says."""
    try:
        _native.call("cuda", "ssm_ops_probe", ctypes.c_int64(index))
    except RuntimeError as error:
        rebuild = f"SSM_OPS_BUILD=cuda {_native.BUILD_COMMAND}"
        return f"the cuda library has nothing to run on this {_device_name(index)} ({error}); build it here: {rebuild}"
    return None


def problem(operator: str, impl: str, index: int) -> str | None:
    """None if `impl` may compute `operator` on CUDA device `index`, else why not."""
    return _problem(operator, impl, index)


# A compiler asks once, while it traces. This is all that torch.compiler.assume_constant_result does, but for importing
# the compiler, which takes seconds.
problem._dynamo_marked_constant = True


@functools.cache  # a process asks once, too
def _problem(operator: str, impl: str, index: int) -> str | None:
    if impl not in CHECKED_IMPLS or torch.cuda.device_count() == 0:
        return None
    if impl == "cuda" and (missing := probe(index)) is not None:
        return missing
    if policy() == "0":
        return None
    if policy() == "1":
        known, fault = remembered(operator, impl, index)
        if known:
            return _said(fault)
    _LOG.warning(
        "ssm_ops: %s by %s runs on this %s for the first time: it is checked, once", operator, impl, _device_name(index)
    )
    return _said(check(operator, impl, torch.device("cuda", index)))


def _said(fault: str | None) -> str | None:
    return None if fault is None else f"it failed its self-check ({fault}); {AGAIN}, {VARIABLE}=0 uses it all the same"
