"""The doctor: ``python -m ssm_ops`` tells which implementation of every operator runs where, and why not the others."""

from __future__ import annotations

import platform

import torch

import ssm_ops

from ._library import BUILD_COMMAND, DEFAULT_IMPL, IMPLS, OPERATORS, chosen, why_unavailable


def devices() -> list[tuple[str, str]]:
    """(type, description) of the CPU and of every visible GPU."""
    found = [("cpu", f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(("cuda", f"cuda:{i}: {torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    return found


def report() -> str:
    """The whole table as text."""
    lines = [
        f"ssm_ops {ssm_ops.__version__}, torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), "
        f"Python {platform.python_version()}",
        f"auto prefers: {'the fastest' if DEFAULT_IMPL == 'auto' else DEFAULT_IMPL} (SSM_OPS_IMPL)",
    ]
    for device_type, description in devices():
        lines += ["", description]
        for operator in OPERATORS.values():
            lines.append(f"  {operator.name}: auto takes {chosen(operator, device_type)}")
            for impl in IMPLS:
                reason = why_unavailable(operator, impl, device_type)
                lines.append(f"    {impl:<10} {'available' if reason is None else 'no: ' + reason}")
    if torch.cuda.device_count() == 0:
        why = (
            "torch is built without CUDA" if torch.version.cuda is None else "torch is built for CUDA but finds no GPU"
        )
        lines += ["", f"no CUDA device: {why}"]
    return "\n".join([*lines, "", f"to build what is missing: {BUILD_COMMAND}"])


if __name__ == "__main__":
    print(report())
