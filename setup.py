"""What is installed, and the build of the compiled operators.

The libraries are installed always; in an editable install (`-e`) also the script packages of the checkout, so that
scripts and tests find each other from any folder.

SSM_OPS_BUILD=auto|none|cpu|cuda|onnxruntime chooses what to compile. "auto" builds the CPU library, that for ONNX
Runtime, and where there is nvcc the CUDA library (half a minute), and installs without what fails; a name makes its
failure an error, which shows the reason. Building needs no GPU: TORCH_CUDA_ARCH_LIST says for which ones; without it,
ARCHITECTURES. pip hides what a build prints, so ssm_ops/_built.json keeps what was left out and why, for
`python -m ssm_ops`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

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
NO_NVCC = "nvcc was found neither in CUDA_HOME nor on the PATH"

asked = os.environ.get("SSM_OPS_BUILD", "auto")
if asked not in BUILDS:
    sys.exit(f"error: SSM_OPS_BUILD={asked!r} is not one of {', '.join(BUILDS)}")

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
        optional=asked == "auto",
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
        optional=asked == "auto",
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
    """Plain shared libraries with C interfaces. Sources in .cu go through nvcc, two at a time."""

    def run(self):
        if asked == "cuda" and find_nvcc() is None:
            raise CompileError(
                f"SSM_OPS_BUILD=cuda: {NO_NVCC}: install NVIDIA's CUDA toolkit, set CUDA_HOME to it, or build for the "
                "CPU: SSM_OPS_BUILD=cpu"
            )
        self.left_out = {} if WHY_NO_CUDA is None else {"cuda": WHY_NO_CUDA}
        super().run()
        package = Path(self.get_ext_fullpath("ssm_ops._built")).parent  # in an editable install that of the checkout
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            # named for one version of Python by an earlier setup.py; Python would take it before this one
            for other in target.parent.glob(f"{target.stem}.*{target.suffix}") if target.exists() else ():
                other.unlink()
        package.mkdir(parents=True, exist_ok=True)
        (package / "_built.json").write_text(json.dumps({"asked": asked, "left_out": self.left_out}, indent=1) + "\n")

    def get_ext_filename(self, fullname):
        """Without a version of Python, of which the libraries know nothing."""
        return str(Path(*fullname.split("."))) + EXTENSION_SUFFIXES[-1]

    def get_export_symbols(self, ext):
        """No PyInit_*: they are no modules of Python."""
        return ext.export_symbols

    def build_extension(self, ext):
        try:
            if not ext.sources:
                raise CompileError(f"the sources of {ext.name} are not here: take a checkout or an sdist")
            if ext.sources[0].endswith(".cu"):
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            name = ext.name.removeprefix("ssm_ops._")
            self.left_out[name] = f"{' '.join(str(error).split())}; SSM_OPS_BUILD={name} shows why"
            raise

    def build_cuda(self, ext):
        target, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp, "cuda")
        nvcc = find_nvcc()
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
            if asked != "auto":
                print(done.stdout, file=sys.stderr)
            raise CompileError(f"nvcc failed on {command[-3]}")


class Build(build):
    def run(self):
        """A wheel is all that lies in this folder: also a module that is gone, a library that is not asked for now."""
        if Path(self.build_lib).exists():
            shutil.rmtree(self.build_lib)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self):
        """One wheel serves all versions of Python: its libraries are loaded by ctypes and use nothing of Python's."""
        return ("py3", "none", super().get_tag()[2])


def cuda_extension() -> Extension:
    folder = Path("kernels/csrc/cuda")
    return Extension(
        "ssm_ops._cuda",
        sources=sorted(map(str, folder.glob("*.cu"))),
        depends=sorted(map(str, [*folder.glob("*.cuh"), *SHARED_HEADERS])),
        extra_compile_args=["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"],
        optional=asked == "auto",
    )


def why_no_cuda() -> str | None:
    """Why "auto" builds no CUDA library; torch is imported only where there is a compiler, as that takes seconds."""
    if find_nvcc() is None:
        return NO_NVCC
    try:
        import torch
    except ImportError:  # an isolated build does not see the torch that it is for; where nvcc is, that may have CUDA
        return None
    return None if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"


WHY_NO_CUDA = why_no_cuda() if asked == "auto" else None

extensions = [cpu_extension()] if asked in ("auto", "cpu") else []
extensions += [onnxruntime_extension()] if asked in ("auto", "onnxruntime") else []
extensions += [cuda_extension()] if asked == "cuda" or (asked == "auto" and WHY_NO_CUDA is None) else []

setup(
    packages=packages,
    package_dir={library: f"{where}/{library}" for library, where in LIBRARIES.items()},
    ext_modules=extensions,
    cmdclass={"build": Build, "build_ext": BuildExtensions, "bdist_wheel": Wheel},
)
