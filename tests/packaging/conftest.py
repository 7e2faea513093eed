"""The sources of the packages as somebody else has them, what is built from them, and environments of their own."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")
FOLDERS = ("kernels/csrc", "kernels/ssm_ops", "classification", "detection", "segmentation", "analyze")
# what `python -m build --no-isolation` and `pip install --no-build-isolation` call: no index is needed
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def environment(**changed: str) -> dict[str, str]:
    """Of a process without this checkout, and without nvcc, which would build for half a minute where it is found."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_HOME", "CUDA_PATH", "SSM_OPS_BUILD")}
    folders = [folder for folder in kept["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()]
    return kept | {"PATH": os.pathsep.join(folders)} | changed


def build(kind: str, sources: Path, out: Path, **env: str) -> subprocess.CompletedProcess:
    """`kind` is sdist, wheel or editable; the name of the file is the last line of stdout."""
    return subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=sources,
        env=environment(**env),
        capture_output=True,
        text=True,
    )


def built(kind: str, sources: Path, out: Path, **env: str) -> Path:
    done = build(kind, sources, out, **env)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is committed of the sources, without anything compiled."""
    folder = tmp_path_factory.mktemp("packages") / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_built.json", "*.egg-info")
    for part in FOLDERS:
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def sdist(checkout) -> Path:
    return built("sdist", checkout, checkout.parent / "dist", SSM_OPS_BUILD="none")


@pytest.fixture(scope="session")
def plain_wheel(sdist, tmp_path_factory) -> Path:
    """The wheel of the sdist, without compiled operators."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.unpack_archive(sdist, folder, filter="data")
    return built("wheel", next(folder.iterdir()), folder / "dist", SSM_OPS_BUILD="none")


@pytest.fixture
def unpacked(sdist, tmp_path) -> Path:
    """The sdist, unpacked."""
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    return next((tmp_path / "unpacked").iterdir())


@pytest.fixture
def install(tmp_path) -> Callable[[Path], Path]:
    """Installs a wheel in an environment of its own, which sees the packages of this one, but nothing of this checkout;
    gives its Python."""

    def install(wheel: Path) -> Path:
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = folder / "bin" / "python"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--no-compile",
        ]
        subprocess.run([*pip, wheel], check=True, env=environment())
        here = sysconfig.get_path("purelib")
        there = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        # a path alone: what makes this checkout importable here is a file .pth, which is not read there
        Path(there, "seen.pth").write_text(f"{here}\n")
        return python

    return install
