"""The doctor: ``python -m ssm_ops`` tells which implementation of every operator runs where, and why not the others;
``--check`` runs them all on small problems beside the reference."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator

import torch

import ssm_ops

from . import _built, _trust
from ._library import BUILD_COMMAND, DEFAULT_IMPL, IMPLS, OPERATORS, Operator, preferred, why_unavailable


def devices() -> list[tuple[torch.device, str]]:
    """The CPU and every visible GPU, with a description."""
    cpu = f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    found = [(torch.device("cpu"), cpu)]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append((torch.device("cuda", i), f"cuda:{i}: {torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    return found


def standing(operator: Operator, impl: str, device: torch.device) -> tuple[bool, str]:
    """Would "auto" take it, as far as is known without a check; and that in words."""
    reason = why_unavailable(operator, impl, device.type)
    if reason is not None:
        return False, f"no: {reason}"
    if device.type == "cpu" or impl not in _trust.CHECKED_IMPLS:
        return True, "available"
    if impl == "cuda" and (missing := _trust.probe(device.index)) is not None:
        return False, f"no: {missing}"
    if _trust.policy() == "0":
        return True, f"available, not checked ({_trust.VARIABLE}=0)"
    known, fault = _trust.remembered(operator.name, impl, device.index)
    if not known:
        return True, "available; checked at its first use, or by --check"
    return (True, "available, checked") if fault is None else (False, f"refused by its self-check: {fault}")


def report() -> str:
    """The whole table as text."""
    lines = [
        f"ssm_ops {ssm_ops.__version__}, torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), "
        f"Python {platform.python_version()}",
        f"auto prefers: {'the fastest' if DEFAULT_IMPL == 'auto' else DEFAULT_IMPL} (SSM_OPS_IMPL)",
        *_built.describe(),
    ]
    for device, description in devices():
        lines += ["", description]
        for operator in OPERATORS.values():
            taken = next(n for n in preferred(operator, device.type) if standing(operator, n, device)[0])
            lines.append(f"  {operator.name}: auto takes {taken}")
            lines += [f"    {impl:<10} {standing(operator, impl, device)[1]}" for impl in IMPLS]
    if torch.cuda.device_count() == 0:
        why = (
            "torch is built without CUDA" if torch.version.cuda is None else "torch is built for CUDA but finds no GPU"
        )
        lines += ["", f"no CUDA device: {why}"]
    return "\n".join([*lines, "", f"to build what is missing: {BUILD_COMMAND}"])


def check(wanted: list[torch.device]) -> Iterator[tuple[str, str | None]]:
    """Run every implementation that is there on these devices. Line of the table, and what is wrong."""
    for device in wanted:
        for operator in OPERATORS.values():
            for implementation in operator.implementations:
                impl = implementation.name
                if impl != "reference" and why_unavailable(operator, impl, device.type) is None:
                    fault = _trust.check(operator.name, impl, device)
                    yield f"{device!s:<8} {operator.name:<20} {impl:<8} {fault or 'right'}", fault


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or with --check 1 where a result is wrong and 2 where there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m ssm_ops", description=__doc__.replace("``", "`"))
    parser.add_argument("--check", action="store_true", help="forward, backward and repeatability of all that is there")
    parser.add_argument("--device", help="with --check: only this one, cpu or cuda:0; default: all")
    given = parser.parse_args(argv)
    if not given.check:
        if given.device is not None:
            parser.error("--device goes with --check")
        print(report())
        return 0
    here = [device for device, _ in devices()]
    if given.device is not None:
        here = [device for device in here if str(device) == given.device or device.type == given.device]
        if not here:
            names = ", ".join(str(device) for device, _ in devices())
            print(f"--device {given.device} is not here; there is {names}", file=sys.stderr)
            return 2
    faults = []
    for line, fault in check(here):
        print(line, flush=True)
        faults.append(fault is not None)
    if not faults:
        print(f"nothing to check: only the reference runs here. To build the rest: {BUILD_COMMAND}")
    elif any(faults):
        print(f"{sum(faults)} of {len(faults)} are wrong: auto does not use those on a GPU")
    else:
        print(f"all {len(faults)} are right")
    return 1 if any(faults) else 0


if __name__ == "__main__":
    sys.exit(main())
