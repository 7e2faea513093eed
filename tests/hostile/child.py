"""Runs a command that may crash, hang or fill the memory in a process of its own, under limits."""

import os
import resource
import subprocess


def run_limited(command: list[str], *, memory_gb: float, seconds: float, **options) -> subprocess.CompletedProcess:
    """The finished process, with its output as text. Fails with TimeoutExpired after `seconds`; what it allocates
    beyond `memory_gb` of address space raises MemoryError in it."""

    def limit() -> None:
        size = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        command, preexec_fn=limit, capture_output=True, text=True, timeout=seconds, env=environment, **options
    )
