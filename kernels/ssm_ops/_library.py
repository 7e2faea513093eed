"""How this package registers PyTorch operators and chooses between their implementations.

An operator is registered once (schema, fake, one kernel per device) and may have several interchangeable
implementations, each a module ``impl/<name>.py`` with the launchers of the forward and the backward. The name of the
chosen implementation travels as the operator's last argument ``impl``, so that the choice is made once, in ``api.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from . import _native, _trust

NAMESPACE = "ssm_ops"
IMPLS = ("reference", "cpu", "triton", "cuda")
BUILD_COMMAND = _native.BUILD_COMMAND


def _default_impl() -> str:
    name = os.environ.get("SSM_OPS_IMPL", "auto")
    if name not in ("auto", *IMPLS):
        raise ValueError(f"SSM_OPS_IMPL={name!r} is not one of auto, {', '.join(IMPLS)}")
    return name


DEFAULT_IMPL = _default_impl()
"""What ``impl="auto"`` prefers; from the environment variable ``SSM_OPS_IMPL``, read once, here."""


TRITON_NEEDED = (3, 3)  # has tl.gather
TRITON_MAJOR = 3  # of 3.6 and 3.9 it is known that they compile the kernels; a next one may be another language


def _triton_problem() -> str | None:
    """Why the Triton kernels cannot be compiled, or are not to be trusted; without importing triton, which takes a
    second."""
    if torch.version.hip is not None:  # its devices are called cuda, too
        return f"torch is built for ROCm {torch.version.hip}: the kernels are for NVIDIA GPUs, with warps of 32 threads"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of another name (pytorch-triton), made for its torch
        return None
    if int(version.split(".")[0]) > TRITON_MAJOR:
        return f"triton {version} is newer than the kernels, which are for {TRITON_MAJOR}: pip install 'triton<4'"
    if tuple(map(int, version.split(".")[:2])) < TRITON_NEEDED:
        return f"triton {version} is too old: the kernels need {'.'.join(map(str, TRITON_NEEDED))}, with torch 2.7"
    return None


# ---- which implementation runs where -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator: its module, and the kinds of device it serves (None: all)."""

    name: str
    module: str
    devices: tuple[str, ...] | None

    def load(self):
        return sys.modules.get(self.module) or importlib.import_module(self.module)


@dataclass(frozen=True)
class Operator:
    """An operator with its implementations, fastest first, and the dtypes of those that are kernels (None: all)."""

    name: str
    implementations: tuple[Implementation, ...]
    kernel_dtypes: tuple[torch.dtype, ...] | None

    def find(self, impl: str) -> Implementation | None:
        for implementation in self.implementations:
            if implementation.name == impl:
                return implementation
        return None


OPERATORS: dict[str, Operator] = {}

SINGLE_AND_HALF = (torch.float32, torch.float16, torch.bfloat16)


def declare(
    name: str, package: str, kernel_dtypes: tuple[torch.dtype, ...] | None = None, **devices: tuple[str, ...] | None
) -> Operator:
    """Announce operator `name` of `package`; ``impl=devices`` pairs in order of preference, reference last."""
    implementations = tuple(Implementation(i, f"{package}.impl.{i}", where) for i, where in devices.items())
    operator = OPERATORS[name] = Operator(name, implementations, kernel_dtypes)
    return operator


# What this process has, found out once: a compiler that traces `resolve` must not meet searches of the file system.
_MISSING = {impl: why for impl, why in (_native.PROBLEMS | {"triton": _triton_problem()}).items() if why is not None}
_INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable(operator: Operator, impl: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """None if `impl` can compute `operator` on this kind of device (and dtype), else the reason and the remedy."""
    if operator.find(impl) is None:
        return f"{operator.name} has no {impl} implementation"
    return _MISSING.get(impl) or _why_unfit(operator, impl, device_type, dtype)


def _why_unfit(operator: Operator, impl: str, device_type: str, dtype: torch.dtype | None) -> str | None:
    """None if `impl`, once ready, computes `operator` on this kind of device (and dtype), else the reason."""
    if impl != "reference" and None not in (dtype, operator.kernel_dtypes) and dtype not in operator.kernel_dtypes:
        return f"it computes in {', '.join(map(str, operator.kernel_dtypes))}, not in {dtype}"
    if impl == "triton" and device_type == "cpu":
        return None if _INTERPRETS_TRITON else "triton runs on CPU tensors only under TRITON_INTERPRET=1"
    devices = operator.find(impl).devices
    if devices is not None and device_type not in devices:
        return f"it serves {', '.join(devices)} tensors, not {device_type}"
    return None


def available(operator: Operator, device_type: str, dtype: torch.dtype | None = None) -> list[str]:
    """Names of the implementations that can run on this kind of device (and dtype), fastest first."""
    names = [i.name for i in operator.implementations if why_unavailable(operator, i.name, device_type, dtype) is None]
    return sorted(names, key=lambda name: name == "triton" and device_type == "cpu")  # an interpreter, for tests


def preferred(operator: Operator, device_type: str, dtype: torch.dtype | None = None) -> list[str]:
    """What "auto" takes the first of that passes its self-check: what ``SSM_OPS_IMPL`` prefers, if that can run, then
    the fastest."""
    names = available(operator, device_type, dtype)
    return sorted(names, key=lambda name: name != DEFAULT_IMPL)


def distrust(operator: Operator, impl: str, device: torch.device) -> str | None:
    """None if `impl` was found right on this device, or need not be asked (_trust.py); else what is wrong."""
    return None if device.type != "cuda" else _trust.problem(operator.name, impl, device.index or 0)


_WARNED: set[str] = set()


def resolve(operator: Operator, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation to run. ``auto`` warns once of a faster one that is not ready; a name never falls back.

    Raises:
        ValueError: `impl` is not a known name.
        RuntimeError: the named implementation cannot run on `device` or in `dtype`; says why and what can.
    """
    if impl == "auto":
        known = _known_on_cpu() if device.type == "cpu" and not torch.compiler.is_compiling() else None
        if known is not None and (operator.name, dtype) in known:
            return known[operator.name, dtype]
        for name in preferred(operator, device.type, dtype):  # the reference, which is the last, is never refused
            refusal = distrust(operator, name, device)
            if refusal is None:
                break
            if not torch.compiler.is_compiling():
                _warn(f"{operator.name} does not use {name} on {device}: {refusal}", frames=4)
        if name != DEFAULT_IMPL and not torch.compiler.is_compiling():
            _warn_of_missing(operator, name, device.type, dtype)
        if known is not None:
            known[operator.name, dtype] = name
        return name
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of auto, {', '.join(IMPLS)}")
    reason = why_unavailable(operator, impl, device.type, dtype) or distrust(operator, impl, device)
    if reason is not None:
        raise RuntimeError(
            f"{operator.name}: impl={impl!r} is not available on {device}: {reason}. Available here: "
            f"{', '.join(available(operator, device.type, dtype))}. To build the rest: {BUILD_COMMAND}; "
            f"`python -m ssm_ops` shows the whole table."
        )
    return impl


_KNOWN: tuple[object, dict[tuple[str, torch.dtype], str]] | None = None


def _known_on_cpu() -> dict[tuple[str, torch.dtype], str]:
    """What "auto" takes on the CPU, by operator and dtype: that does not change, and small inputs feel the search."""
    global _KNOWN
    asked = (DEFAULT_IMPL, _MISSING, _WARNED, OPERATORS)
    if _KNOWN is None or any(a is not b for a, b in zip(_KNOWN[0], asked, strict=True)):
        _KNOWN = (asked, {})
    return _KNOWN[1]


def _warn_of_missing(operator: Operator, taken: str, device_type: str, dtype: torch.dtype) -> None:
    """Once per reason: a faster implementation would fit but is not ready, and the reference runs in its place; or the
    preferred one, or one whose library is there but of no use."""
    for implementation in operator.implementations:
        impl = implementation.name
        if impl == taken:
            return
        reason = _MISSING.get(impl)
        if reason is None or reason in _WARNED or _why_unfit(operator, impl, device_type, dtype) is not None:
            continue
        if taken == "reference" or impl == DEFAULT_IMPL or _native.PATHS.get(impl) is not None:
            _WARNED.add(reason)
            slow = "its slow reference implementation" if taken == "reference" else taken
            _warn(f"{operator.name} runs {slow} on {device_type} tensors: {reason}; see `python -m ssm_ops`", frames=5)


def _warn(message: str, frames: int) -> None:
    """Once per message, at the line that called the operator, so many frames up."""
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(f"ssm_ops: {message}", RuntimeWarning, stacklevel=frames)


# ---- registration --------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(operator: Operator, schema: str, fake: Callable, launcher: str):
    """Define ``ssm_ops::<schema>`` and return its overload, ready to call.

    The schema's last argument is ``str impl``. On every device the operator calls the function `launcher` of that
    implementation's module, imported on first use, with autocast off (it stays on inside an operator's body otherwise
    and would change the precision the contract states).
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)

    def launch(*args):
        *args, impl = args
        run = getattr(operator.find(impl).load(), launcher)
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):  # entering the context takes longer than asking
            return run(*args)
        with no_autocast(device):
            return run(*args)

    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    LAUNCHERS[overload] = launch
    return overload


LAUNCHERS: dict[object, Callable] = {}
"""What a registered operator calls, for callers that need nothing of the dispatcher."""


def register_autograd(overload, kernel: Callable) -> None:
    """Let `kernel`, which takes the same arguments, answer for a registered operator wherever autograd sees it."""
    _LIBRARY.impl(overload._schema.name.split("::")[1], kernel, "Autograd")


def no_autocast(device_type: str):
    """Context in which autocast is off for this kind of device; there is none for shapes alone (meta)."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)


def is_transformed() -> bool:
    """Whether transforms of `torch.func` (also those of vectorised Jacobians and batched gradients) or forward-mode
    derivatives are at work. They see operators alone: no kernels behind them, and no layouts in memory."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def runs_eagerly(*tensors: torch.Tensor | None) -> bool:
    """Whether a call may be computed by what has no derivative and no name for PyTorch: nobody wants a derivative of
    `tensors`, which are more than shapes, and nobody looks at the operators, as compilers, tracers, transforms and
    counters do."""
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if is_transformed():
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and all(type(t) in _PLAIN and not t.is_meta for t in given)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
