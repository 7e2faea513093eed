"""Compiles kernels for GPUs that are not here, and reads what the compiler made of them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from gpus import RESERVED
from launches import Launch
from sass import Instruction, functions
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Binary:
    registers: int
    stack: int  # bytes of memory per thread: registers that were spilled
    shared: int  # bytes per block, without what a launch adds
    code: list[Instruction]


def tool(name: str) -> str:
    """nvcc, or cuobjdump, from CUDA_HOME, the PATH or Triton. RuntimeError where there is none."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    places = (str(Path(os.environ.get("CUDA_HOME", "")) / "bin"), None, str(bundled))
    found = next(filter(None, (shutil.which(name, path=place) for place in places)), None)
    if found is None:
        raise RuntimeError(f"no {name}: install the CUDA toolkit, or set CUDA_HOME to where it is")
    return found


def compile_launch(launch: Launch, capability: int) -> Binary:
    if launch.implementation == "triton":
        return _triton(launch, capability)
    name, lanes = launch.source
    source = CUDA / f"{name}_{str(launch.dtype).removeprefix('torch.')}.cu"
    found = cuda_binaries(f'#include "{source}"\n', capability)
    # _Z..forward_kernel I <dtype> Li <lanes> E Lb <keeps states> E E, _Z..backward_kernel I .. Lb <gated> E E
    flag = "Lb1E" if name.endswith("forward") else "Lb0E"
    return next(b for n, b in found.items() if f"{launch.kernel}I" in n and f"Li{lanes}E" in n and flag in n)


@functools.cache
def cuda_binaries(text: str, capability: int, *options: str) -> dict[str, Binary]:
    """By mangled name. RuntimeError where nvcc fails."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        source.write_text(text)
        command = [tool("nvcc"), "-O3", "-std=c++17", f"-arch=sm_{capability}", *options, "-cubin", "-o", str(cubin)]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc for sm_{capability}: {done.stderr.strip()[-500:]}; compiled was: {text.strip()}")
        return read(cubin, capability)


_TRITON: dict[tuple, Binary] = {}


def _triton(launch: Launch, capability: int) -> Binary:
    """Integers are int32 or int64 and pointers aligned, as the kernels' `do_not_specialize` has it."""
    kernel, arguments, warps = launch.source
    signature, constants, options, attributes = {}, {}, {"num_warps": warps}, {}
    for name, x in arguments.items():
        if name not in kernel.arg_names:
            options[name] = x
        elif isinstance(x, torch.Tensor):
            attributes[kernel.arg_names.index(name),] = [["tt.divisibility", 16]]
            signature[name] = f"*{TYPES[x.dtype]}"
        elif x is None or kernel.params[kernel.arg_names.index(name)].is_constexpr:
            signature[name], constants[name] = "constexpr", x
        else:
            signature[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
    key = (kernel.__name__, capability, *(str(x) for x in (signature, constants, options)))
    if key not in _TRITON:
        source = ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(made.asm["cubin"])
            (binary,) = read(cubin, capability, made.metadata.shared).values()
        _TRITON[key] = binary
    return _TRITON[key]


def read(cubin: Path, capability: int, shared: int = 0) -> dict[str, Binary]:
    """By (mangled) name; `shared` bytes are added to what the kernels declare."""
    usage, text = (
        subprocess.run([tool("cuobjdump"), option, str(cubin)], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    system = RESERVED if capability >= 90 else 0  # which the CUDA 13 assembler counts from 9.0 on
    code, found = functions(text), {}
    for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        registers, stack, own = map(int, numbers)
        found[name] = Binary(registers, stack, max(own - system, 0) + shared, code[name])
    return found
