"""Runs CUDA kernels on the CPU, to test them: builds `.cu` files with g++ against the headers of this folder, loads the
result, and tells what its kernels did. README.md says what is emulated, checked and counted."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WORKS_HERE = sys.platform == "linux" and shutil.which("g++") is not None
ORDERS = ("forward", "reverse", "random", "greedy")
COUNTS = (
    *("blocks", "barriers", "shuffles"),
    *("global_requests", "global_sectors", "least_global_sectors"),
    *("shared_requests", "shared_wavefronts", "least_shared_wavefronts"),
)
"""`Counts` of runtime.h. Requests are of a warp, sectors of 32 bytes; a request to shared memory takes more than the
least wavefronts where its lanes want different words of the same bank."""
CALLBACKS = ("-fsanitize=thread",)
"""Makes the compiler call the emulator before every load and store."""
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""Checks by the compiler's own sanitizers in place of the emulator's."""

COMPILE = ("g++", "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", f"-I{HERE / 'include'}", "-c")

# What C++ has no form for: shared memory, bounds of a launch, and the launch itself.
_SHARED = re.compile(r"(extern\s+)?__shared__\s+(?:__align__\(\d+\)\s*)?([\w:<>, ]+?)\s+(\w+)((?:\[[^\]]*\])*)\s*;")
_BOUNDS = re.compile(r"__launch_bounds__\(([^()]*)\)[^;{]*\{")
_LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)


def as_cpp(text: str) -> str:
    """CUDA's own syntax, in C++ that has as many lines."""

    def shared(match: re.Match) -> str:
        dynamic, of, name, dimensions = match.groups()
        if dynamic:
            return f"{of}* const {name} = static_cast<{of}*>(emulator::dynamic_shared());"
        return f'auto& {name} = emulator::shared<{of}{dimensions}>("{name}");'

    text = _SHARED.sub(shared, text)
    text = _BOUNDS.sub(r"\g<0> emulator::launch_bounds(\1);", text)
    return _LAUNCH.sub(r"emulator::launcher(\1, \2)(", text)


def build(root: Path, units: Iterable[str], folder: Path, flags: Iterable[str] = CALLBACKS) -> Path:
    """A shared library of the emulator and of `units`, `.cu` files that are named relative to `root`.

    Args:
        root: a folder of sources, copied as a whole.
        folder: where to build; new.

    Raises:
        RuntimeError: g++ failed; with what it said.
    """
    shutil.copytree(root, folder / "sources")
    for path in (folder / "sources").rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h"):
            path.write_text(as_cpp(path.read_text()))
    # kernels look at one type through another, and name unrolling in words of nvcc
    device = [*COMPILE, "-Og", *flags, "-fno-strict-aliasing", "-fno-tree-sra", "-Wno-unknown-pragmas", "-x", "c++"]
    commands = [[*device, str(folder / "sources" / unit)] for unit in units]
    objects = [str(folder / f"{i}.o") for i in range(len(commands))]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command, to: _run([*command, "-o", to]), commands, objects))
    library = folder / "emulated.so"
    link = ["g++", "-shared", *(f for f in flags if f not in CALLBACKS)]
    _run([*link, *objects, f"{_runtime().name}/runtime.o", "-o", str(library)])
    return library


@functools.cache
def _runtime() -> tempfile.TemporaryDirectory:
    """The folder of runtime.o, for as long as this process runs."""
    folder = tempfile.TemporaryDirectory(prefix="cuda_emulator_")
    _run([*COMPILE, "-O2", str(HERE / "runtime.cpp"), "-o", f"{folder.name}/runtime.o"])
    return folder


def build_once(folders: pytest.TempPathFactory, name: str, root: Path, units: Iterable[str]) -> Path:
    """`build`, once for all processes of a run of pytest."""
    base = folders.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"cuda_emulator_{name}"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "emulated.so"
        return done if done.exists() else build(root, units, folder)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-4000:]}")


class Emulator:
    """A library made by `build`. `library` is it as ctypes loads it."""

    def __init__(self, path: Path):
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.emulator_counts.restype = ctypes.POINTER(ctypes.c_int64)

    def allow(self, *tensors: torch.Tensor) -> None:
        """Let kernels use the memory of CPU tensors, all of their storages, until `forbid`."""
        for x in tensors:
            storage = x.untyped_storage()
            self.library.emulator_map(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes()))

    def forbid(self) -> None:
        self.library.emulator_unmap_all()

    def order(self, name: str, seed: int = 0) -> None:
        """In which order the threads of a block run between barriers, from the next launch on."""
        self.library.emulator_set_order(ORDERS.index(name), ctypes.c_uint(seed))

    def counts(self) -> dict[str, int]:
        """What the kernels did since the library was loaded, in the terms of COUNTS."""
        return dict(zip(COUNTS, self.library.emulator_counts()[: len(COUNTS)], strict=True))

    def explain(self, report: str) -> str:
        """A report, with file and line in place of addresses in the code."""

        def line(match: re.Match) -> str:
            done = subprocess.run(["addr2line", "-e", self.path, match[1]], capture_output=True, text=True)
            return f"(at {Path(done.stdout.split()[0]).name})"

        return re.sub(r"\[\+(0x[0-9a-f]+)\]", line, report)
