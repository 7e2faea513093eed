"""The machine: what numbers were made with (versions, the commit, memory), cores and memory there are."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import timm
import torch

from ssm_train.common.distributed import local_processes

try:
    import resource
except ImportError:  # Windows
    resource = None

# distribution name of this repository, when it is installed
_DISTRIBUTION = "vision-ssm"
# of containers, by the second and the first version of control groups
_UNKNOWN_MEMORY = 8 * 2**30  # bytes; what a laptop has at least, for systems that do not tell
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    # a checkout that is not installed has no version
    with contextlib.suppress(metadata.PackageNotFoundError):
        found[_DISTRIBUTION] = metadata.version(_DISTRIBUTION)
    commit = _commit()
    return {**found, "commit": commit} if commit else found


@functools.cache
def _commit() -> str:
    """The commit of the checkout, with "-dirty" when files differ from it; "" where this is none or git is missing."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        # installed: a repository around it would be another one
        return ""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(device: torch.device) -> int:
    """Memory that this process can have: of the GPU, or its share of the machine's or container's; of 8 GB where the
    system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    known = hasattr(os, "sysconf")
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else _UNKNOWN_MEMORY]
    for path in _MEMORY_LIMITS:
        # there is no such file, or it says "max"
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    return min(limits) // local_processes()


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has used: allocated on a GPU, resident on a CPU, in MB (2**20 bytes); 0 where the
    system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in units of 1024 bytes, macOS in bytes
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
