"""Compiles Triton kernels for GPUs that are not here."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_for_gpu(
    kernel, pointers: dict[str, str | None], constants: dict, num_warps: int, capability: int, **options
) -> bytes:
    """The kernel's cubin. `pointers`: dtype by name, None for an absent tensor; other arguments are int32."""
    constants = constants | {name: None for name, dtype in pointers.items() if dtype is None}
    signature = {}
    for parameter in kernel.params:
        dtype = pointers.get(parameter.name)
        signature[parameter.name] = "constexpr" if parameter.name in constants else f"*{dtype}" if dtype else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": num_warps} | options
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes a thread keeps in memory because it has not enough registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"no {tool}")
    (folder / "kernel.cubin").write_bytes(cubin)
    usage = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])
