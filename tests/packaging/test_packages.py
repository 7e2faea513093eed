"""sdist and wheel: what is in them, what is built from them, and that they run outside a checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ssm_ops
from ssm_ops import _built
from tests.packaging.conftest import ROOT, build, built, environment

NAME = f"vision_ssm-{ssm_ops.__version__}"
COMPILER = shutil.which("g++")
NVCC = shutil.which("nvcc")

# the first line is where the packages are from; what follows is the doctor's
USE = """
import importlib.util, sys
from pathlib import Path
import timm, torch, ssm_models
from ssm_ops.__main__ import main
ours = ("ssm_ops", "ssm_models", "ssm_train", "ssm_mm")
site = {Path(importlib.util.find_spec(name).origin).parents[1] for name in ours}
print(*site)
torch.manual_seed(0)
print(tuple(timm.create_model("vmamba_nano").eval()(torch.randn(1, 3, 32, 32)).shape))
sys.exit(main([]))
"""

# compiles nothing, but writes what it is asked for
STUB = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -z "$out" ] || echo stub >"$out"
"""


def use(python: Path, folder: Path, **env: str) -> list[str]:
    """What USE says, started in an empty folder."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run([python, "-c", USE], cwd=folder, env=environment(**env), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def record(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as file:
        return json.loads(file.read("ssm_ops/_built.json"))


@pytest.fixture
def stubs(tmp_path) -> dict[str, str]:
    """The environment of a build with compilers that take no time."""
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return {name: str(stub) for name in ("CC", "CXX", "LDSHARED", "LDCXXSHARED")}


def stub_nvcc(home: Path, script: str) -> str:
    """A CUDA toolkit whose nvcc is `script`."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(script)
    nvcc.chmod(0o755)
    return str(home)


# ---- what is in them -------------------------------------------------------------------------------------------------


def test_the_sdist_holds_all_sources(sdist, checkout):
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    csrc = [path for path in (checkout / "kernels/csrc").rglob("*") if path.is_file()]
    python = [path for folder in ("kernels", "classification") for path in (checkout / folder).glob("ssm_*/**/*.py")]
    wanted = {path.relative_to(checkout) for path in csrc + python}
    wanted |= {Path("classification/ssm_models/weights", name) for name in ("table.json", "zoo.json")}
    wanted |= {Path(name) for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")}
    assert len(wanted) > 200 and {str(path) for path in wanted} - held == set()
    assert {Path(name).suffix for name in held if "csrc/" in name} >= {".cpp", ".h", ".cu", ".cuh"}
    assert [name for name in held if name.startswith(("tests", "detection", "analyze")) or name.endswith(".so")] == []


def test_a_wheel_of_the_sdist_runs_elsewhere(plain_wheel, install, tmp_path):
    """Without a compiler: plain PyTorch; `python -m ssm_ops` says so, and how it is built."""
    assert plain_wheel.name == f"{NAME}-py3-none-any.whl"
    top = {name.partition("/")[0] for name in names(plain_wheel)}
    assert top == {"ssm_ops", "ssm_models", "ssm_train", "ssm_mm", f"{NAME}.dist-info"}
    python = install(plain_wheel)
    where, logits, *doctor = use(python, tmp_path / "elsewhere")
    assert Path(where).is_relative_to(tmp_path / "environment") and logits == "(1, 10)"
    assert "compiled libraries: none" in doctor
    again = "pip install --no-cache-dir --force-reinstall --no-deps SDIST_OR_CHECKOUT"
    assert f"to build what is missing: {again}" in doctor
    assert f"    cpu        no: the cpu library is not built: SSM_OPS_BUILD=cpu {again}" in doctor


def test_licences_of_others_travel_along(plain_wheel):
    licence = "kernels/csrc/third_party/onnxruntime_LICENSE"
    assert {f"{NAME}.dist-info/licenses/{name}" for name in ("LICENSE", licence)} <= names(plain_wheel)


def test_every_extra_has_its_code_in_the_wheel(plain_wheel):
    assert {"ssm_train/cli.py", "ssm_train/data/sources/parquet.py", "ssm_mm/backbone.py"} <= names(plain_wheel)
    with zipfile.ZipFile(plain_wheel) as file:
        metadata = file.read(f"{NAME}.dist-info/METADATA").decode()
    assert "Requires-Python: >=3.10\n" in metadata
    versions = re.findall(r"Classifier: Programming Language :: Python :: (3\.\d+)", metadata)
    assert versions == ["3.10", "3.11", "3.12", "3.13"]


# ---- what is compiled ------------------------------------------------------------------------------------------------


def test_one_wheel_serves_every_python(unpacked, tmp_path, stubs):
    wheel = built("wheel", unpacked, tmp_path / "dist", **stubs)
    assert wheel.name.startswith(f"{NAME}-py3-none-") and not wheel.name.endswith("any.whl")
    assert {name for name in names(wheel) if name.endswith(".so")} == {"ssm_ops/_cpu.so", "ssm_ops/_onnxruntime.so"}
    reason = "nvcc was found neither in CUDA_HOME nor on the PATH"
    assert record(wheel) == {"asked": "auto", "left_out": {"cuda": reason}}


def test_nothing_of_an_earlier_build_gets_into_a_wheel(unpacked, tmp_path, stubs):
    built("wheel", unpacked, tmp_path / "dist", SSM_OPS_BUILD="cpu", **stubs)
    wheel = built("wheel", unpacked, tmp_path / "dist", SSM_OPS_BUILD="onnxruntime", **stubs)
    assert {name for name in names(wheel) if name.endswith(".so")} == {"ssm_ops/_onnxruntime.so"}
    assert record(wheel) == {"asked": "onnxruntime", "left_out": {}}


def test_where_nvcc_is_the_cuda_library_is_built_without_seeing_torch(unpacked, tmp_path, stubs):
    """As pip's isolated build, which has setuptools alone."""
    home = stub_nvcc(tmp_path / "toolkit", STUB)
    hide = "import sys; sys.modules['torch'] = None\n"
    (unpacked / "setup.py").write_text(hide + (unpacked / "setup.py").read_text())
    wheel = built("wheel", unpacked, tmp_path / "dist", CUDA_HOME=home, **stubs)
    assert "ssm_ops/_cuda.so" in names(wheel) and record(wheel) == {"asked": "auto", "left_out": {}}


def test_what_fails_is_left_out_with_its_reason(unpacked, tmp_path, stubs):
    home = stub_nvcc(tmp_path / "toolkit", "#!/bin/sh\necho unsupported compiler; exit 1\n")
    hide = "import sys; sys.modules['torch'] = None\n"
    (unpacked / "setup.py").write_text(hide + (unpacked / "setup.py").read_text())
    for path in (unpacked / "kernels/csrc/cpu").iterdir():
        path.unlink()
    left_out = record(built("wheel", unpacked, tmp_path / "dist", CUDA_HOME=home, **stubs))["left_out"]
    assert left_out["cpu"].startswith("the sources of ssm_ops._cpu are not here: take a checkout or an sdist; ")
    assert re.fullmatch(r"nvcc failed on \S+\.cu; SSM_OPS_BUILD=cuda shows why", left_out["cuda"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("gpu", "error: SSM_OPS_BUILD='gpu' is not one of auto, none, cpu, cuda, onnxruntime"),
        (
            "cuda",
            "error: SSM_OPS_BUILD=cuda: nvcc was found neither in CUDA_HOME nor on the PATH: install NVIDIA's CUDA "
            "toolkit, set CUDA_HOME to it, or build for the CPU: SSM_OPS_BUILD=cpu",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line(unpacked, tmp_path, asked, said):
    done = build("wheel", unpacked, tmp_path / "dist", SSM_OPS_BUILD=asked)
    assert done.returncode != 0 and done.stderr.splitlines()[-1] == said and "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.whl")) == [] and list(tmp_path.rglob("*.o")) == []


def test_a_missing_compiler_is_one_line(unpacked, tmp_path, stubs):
    done = build("wheel", unpacked, tmp_path / "dist", SSM_OPS_BUILD="cpu", **dict.fromkeys(stubs, "no-such-compiler"))
    assert done.returncode != 0 and "no-such-compiler" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ") and list(tmp_path.rglob("*.whl")) == []


# ---- what the doctor says of it --------------------------------------------------------------------------------------


def test_the_doctor_tells_a_build_of_other_wishes(tmp_path, monkeypatch):
    """pip takes an earlier wheel of the same sdist from its cache, whatever SSM_OPS_BUILD says now."""
    path = tmp_path / "_built.json"
    path.write_text(json.dumps({"asked": "auto", "left_out": {"cuda": "nvcc failed on a.cu; look"}}))
    monkeypatch.setenv("SSM_OPS_BUILD", "cuda")
    first, left_out, other = _built.describe(path)
    assert (
        first.endswith(" (built with SSM_OPS_BUILD=auto)") and left_out == "  left out: cuda: nvcc failed on a.cu; look"
    )
    command = "pip install -e . --no-build-isolation"
    assert other == f"  SSM_OPS_BUILD=cuda is set, but was not when this was built: {command}"
    monkeypatch.setenv("SSM_OPS_BUILD", "auto")
    assert len(_built.describe(path)) == 2 and len(_built.describe(tmp_path / "none")) == 1
    for site in ("site-packages", "dist-packages"):
        assert "--no-cache-dir --force-reinstall" in _built.build_command(Path("/usr/lib", site, "ssm_ops"))


# ---- an editable install ---------------------------------------------------------------------------------------------


def test_an_editable_install_takes_no_name_from_anybody(checkout, install, tmp_path, stubs):
    """It adds the script packages of the checkout, behind a package or a folder of the same name of somebody's own."""
    copy = shutil.copytree(checkout, tmp_path / "checkout")
    stale = copy / "kernels/ssm_ops/_cpu.cpython-311-x86_64-linux-gnu.so"
    stale.touch()
    python = install(built("editable", copy, tmp_path / "dist", SSM_OPS_BUILD="cpu", **stubs))
    assert (copy / "kernels/ssm_ops/_cpu.so").is_file() and not stale.exists()
    (tmp_path / "mine" / "detection").mkdir(parents=True)

    def say(code: str, folder: Path, *arguments: str) -> str:
        command = [python, "-c", code, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
        return done.stdout + done.stderr

    find = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    offered = ["ssm_ops", "ssm_models", "ssm_train", "ssm_mm", "detection", "segmentation", "analyze"]
    others = ["classification", "kernels", "configs"]
    assert say(find, tmp_path, *offered, *others) == f"{offered}\n"
    code = "import detection, segmentation; print(list(detection.__path__), list(segmentation.__path__))"
    said = say(code, tmp_path / "mine")
    assert said == f"{[str(tmp_path / 'mine/detection')]} {[str(copy / 'segmentation')]}\n"


# ---- at length: compiled in earnest ----------------------------------------------------------------------------------


def needed(library: Path) -> set[str]:
    """The libraries that a library loads."""
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", said))


SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}


def check_compiled(python: Path, folder: Path, libraries: str) -> None:
    where, logits, *doctor = use(python, folder)
    assert logits == "(1, 10)" and f"compiled libraries: {libraries}" in "\n".join(doctor)
    assert "  selective_scan: auto takes cpu" in doctor
    assert needed(Path(where, "ssm_ops/_cpu.so")) <= SYSTEM | {"libgomp.so.1"}
    command = [python, "-m", "ssm_ops", "--check", "--device", "cpu"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"all \d+ are right", done.stdout), done.stdout


def index_problem(folder: Path) -> str | None:
    """Why pip cannot have setuptools, which an isolated build asks the index for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, "setuptools>=80"]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"no setuptools for an isolated build: {done.stderr.strip()[-200:]}" if done.returncode else None


@pytest.mark.full
@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_compiled_for_the_cpu_offline(unpacked, install, tmp_path):
    wheel = built("wheel", unpacked, tmp_path / "dist", SSM_OPS_BUILD="cpu")
    check_compiled(install(wheel), tmp_path / "elsewhere", "cpu (built with SSM_OPS_BUILD=cpu)")


@pytest.mark.full
@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_compiled_by_pip_in_isolation(sdist, install, tmp_path):
    if (problem := index_problem(tmp_path / "index")) is not None:
        pytest.skip(problem)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "-w", tmp_path, sdist]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    assert needed_of(wheel, "_onnxruntime.so", tmp_path) <= SYSTEM
    check_compiled(install(wheel), tmp_path / "elsewhere", "cpu, onnxruntime (built with SSM_OPS_BUILD=auto)")


def needed_of(wheel: Path, name: str, folder: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return needed(Path(file.extract(f"ssm_ops/{name}", folder)))


@pytest.mark.full
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_compiled_for_cuda_from_the_sdist(unpacked, tmp_path):
    path = os.environ["PATH"]
    wheel = built("wheel", unpacked, tmp_path / "dist", SSM_OPS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="8.0", PATH=path)
    assert {name for name in names(wheel) if name.endswith(".so")} == {"ssm_ops/_cuda.so"}
    assert needed_of(wheel, "_cuda.so", tmp_path) <= SYSTEM | {"libdl.so.2", "librt.so.1"}


def test_the_libraries_here_need_nothing_but_the_system():
    libraries = list((ROOT / "kernels/ssm_ops").glob("_*.so"))
    if not libraries or shutil.which("readelf") is None:
        pytest.skip("nothing is compiled here, or no readelf")
    allowed = SYSTEM | {"libgomp.so.1", "libdl.so.2", "librt.so.1"}
    assert {path.name: needed(path) - allowed for path in libraries} == {path.name: set() for path in libraries}
