"""What is installed, and the build of the compiled operators.

The libraries are installed always; in an editable install (`-e`) also the script packages of the checkout, so that
scripts and tests find each other from any folder.

SSM_OPS_BUILD=auto|none|cpu|cuda|onnxruntime chooses what to compile. "auto" builds the CPU library, that for ONNX
Runtime, and the CUDA library (half a minute) where there are nvcc and a torch with CUDA, and installs without what
fails; a name makes its failure an error, which shows the reason. Building needs no GPU: TORCH_CUDA_ARCH_LIST says for
which ones; without it, ARCHITECTURES.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARIES = {
    "ssm_ops": "kernels",
    "ssm_models": "classification",
    "ssm_train": "classification",
    "ssm_mm": "classification",
}
SCRIPTS = ("detection", "segmentation", "analyze")
BUILDS = ("auto", "none", "cpu", "cuda", "onnxruntime")
SHARED_HEADERS = [Path("kernels/csrc/buffers.h")]
ARCHITECTURES = ("80", "86", "89", "90", "100")

build = os.environ.get("SSM_OPS_BUILD", "auto")
if build not in BUILDS:
    sys.exit(f"SSM_OPS_BUILD={build!r} is not one of {', '.join(BUILDS)}")

packages = []
for library, where in LIBRARIES.items():
    packages += find_packages(where, include=[library, f"{library}.*"])
if "editable_wheel" in sys.argv:
    packages += [name for folder in SCRIPTS for name in find_packages(".", include=[folder, f"{folder}.*"])]


def cpu_extension() -> Extension:
    """A plain shared library (no Python or torch headers), loaded by ssm_ops/_native.py."""
    folder = Path("kernels/csrc/cpu")
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
    flags += ["-fno-wrapv"]  # Python's own flags say -fwrapv, which keeps loops from becoming vectors: up to 5x slower
    if sys.platform == "linux":
        flags += ["-fopenmp", "-fvisibility=hidden"]
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        flags += ["-mprefer-vector-width=512"]
    return Extension(
        "ssm_ops._cpu",
        sources=sorted(map(str, folder.glob("*.cpp"))),
        depends=sorted(map(str, [*folder.glob("*.h"), *SHARED_HEADERS])),
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"] if sys.platform == "linux" else [],
        optional=build == "auto",
    )


def onnxruntime_extension() -> Extension:
    """Operators of ONNX Runtime (its C API alone, from csrc/third_party) over the forward kernels of the CPU library,
    on the threads of ONNX Runtime, so without OpenMP; loaded by ssm_ops/onnxruntime.py."""
    folder, cpu = Path("kernels/csrc/onnxruntime"), cpu_extension()
    kernels = [f"kernels/csrc/cpu/{name}.cpp" for name in ("causal_conv1d", "selective_scan", "ss2d_scan")]
    linux = sys.platform == "linux"
    return Extension(
        "ssm_ops._onnxruntime",
        sources=[*kernels, *sorted(map(str, folder.glob("*.cpp")))],
        depends=[*cpu.depends, *sorted(map(str, folder.glob("*.h")))],
        extra_compile_args=[flag for flag in cpu.extra_compile_args if flag != "-fopenmp"],
        extra_link_args=["-Wl,-Bsymbolic"] if linux else [],  # its kernels, not those of the CPU library beside it
        optional=build == "auto",
    )


def find_nvcc() -> str | None:
    for home in filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH"))):
        if (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def architecture_flags(nvcc: str) -> list[str]:
    """Machine code for every architecture, and of the last one also PTX, which later GPUs compile when they load it."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    names = [x.removesuffix("+PTX").replace(".", "") for x in re.split("[; ,]+", listed) if x[:1].isdigit()]
    if not names:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        names = [x for x in ARCHITECTURES if f"sm_{x}" in known] or ["80"]
    flags = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


class BuildExtensions(build_ext):
    """Sources in .cu go through nvcc, two at a time, into a shared library like that of the CPU."""

    def build_extension(self, ext):
        if not ext.sources[0].endswith(".cu"):
            return super().build_extension(ext)
        target, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp, "cuda")
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("nvcc was found neither in CUDA_HOME nor on the PATH")
        for where in (folder, target.parent):
            where.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{Path(source).stem}.o") for source in ext.sources]
        compile_ = [nvcc, *ext.extra_compile_args, *architecture_flags(nvcc), "-c"]
        commands = [[*compile_, source, "-o", to] for source, to in zip(ext.sources, objects, strict=True)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.run_command_line, commands))
        self.run_command_line([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(target)])

    def run_command_line(self, command: list[str]) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            if build != "auto":
                print(done.stdout, file=sys.stderr)
            raise CompileError(f"nvcc failed on {command[-3]}; SSM_OPS_BUILD=cuda shows why")


def cuda_extension() -> Extension:
    folder = Path("kernels/csrc/cuda")
    return Extension(
        "ssm_ops._cuda",
        sources=sorted(map(str, folder.glob("*.cu"))),
        depends=sorted(map(str, [*folder.glob("*.cuh"), *SHARED_HEADERS])),
        extra_compile_args=["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"],
        optional=build == "auto",
    )


def wants_cuda() -> bool:
    """The answer of "auto"; torch is imported only where there is a compiler, as that takes seconds."""
    if find_nvcc() is None:
        return False
    try:
        import torch
    except ImportError:  # an isolated build does not see the installed one
        print("ssm_ops: no torch is visible here, so no CUDA library; SSM_OPS_BUILD=cuda builds it", file=sys.stderr)
        return False
    return torch.version.cuda is not None


extensions = [cpu_extension()] if build in ("auto", "cpu") else []
extensions += [onnxruntime_extension()] if build in ("auto", "onnxruntime") else []
extensions += [cuda_extension()] if build == "cuda" or (build == "auto" and wants_cuda()) else []

setup(
    packages=packages,
    package_dir={library: f"{where}/{library}" for library, where in LIBRARIES.items()},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtensions},
)
