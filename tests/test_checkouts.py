"""What a command imports comes from its own checkout, and the installed packages bring no names but their own."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ssm_ops  # noqa: F401  what check_checkout looks at
from ssm_train.common.command import check_checkout
from ssm_train.common.errors import UserError

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another checkout, which is not the one installed."""
    folder = tmp_path_factory.mktemp("other")
    for part in ("classification", "kernels/ssm_ops", "analyze"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


@pytest.mark.parametrize(
    "command", [["classification/main.py", "--cfg", "none.yaml"], ["analyze/loss.py", "--run", "none"]]
)
def test_a_script_refuses_to_run_with_another_checkout(other, tmp_path, command):
    done = run(other / command[0], *command[1:], cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{command[0]} would run with the ssm_ops of " in done.stderr
    assert f"pip install --no-build-isolation --no-deps -e {other.resolve()}" in done.stderr


def test_a_script_runs_with_its_own_checkout(other, tmp_path):
    done = run(other / "classification/main.py", "--cfg", "none.yaml", cwd=tmp_path, PYTHONPATH=str(other / "kernels"))
    assert done.returncode == 2 and "would run with" not in done.stderr and "none.yaml" in done.stderr


def test_a_tool_of_an_environment_inside_a_checkout_serves_any_checkout(other, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(other / ".venv/lib/pytest/__main__.py"), raising=False)
    with pytest.raises(UserError, match="would run with"):
        check_checkout()  # a file of the checkout
    monkeypatch.setattr(sys, "prefix", str(other / ".venv"))
    check_checkout()


def test_no_generic_names_at_top_level(tmp_path):
    """Neither beside the installed packages nor beside main.py, where Python looks first when main.py is run."""
    names = "data config defaults evaluate engine model errors utils step record common trainer start checkpoint"
    code = f"import importlib.util as u; print([n for n in {names.split()} if u.find_spec(n)])"
    for path in ("", str(ROOT / "classification"), str(ROOT / "kernels")):
        assert run("-c", code, cwd=tmp_path, PYTHONPATH=path).stdout == "[]\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel, unpacked, without compiled operators."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in ("classification", "kernels/ssm_ops"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    done = run(*command, cwd=folder, SSM_OPS_BUILD="none")
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(next((folder / "dist").glob("*.whl"))).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_four_packages(site):
    assert {p.name for p in site.iterdir() if p.suffix != ".dist-info"} == {
        "ssm_ops",
        "ssm_models",
        "ssm_train",
        "ssm_mm",
    }
    missing = [
        path.relative_to(ROOT / folder)
        for folder in ("kernels", "classification")
        for path in (ROOT / folder).glob("ssm_*/**/*.py")
        if not (site / path.relative_to(ROOT / folder)).is_file()
    ]
    assert missing == []


@pytest.mark.dense
def test_the_wheel_registers_the_backbone_in_anybodys_config(site, tmp_path):
    """custom_imports=["ssm_mm"], in mmdet and in mmsegmentation, outside a checkout."""
    pytest.importorskip("mmengine")
    code = """
import warnings; warnings.simplefilter("ignore")
from mmengine.config import Config
import ssm_models
Config.fromfile("mine.py")
backbone = dict(type="SSMBackbone", name="vssd_nano")
from mmdet.registry import MODELS as detectors
from mmseg.registry import MODELS as segmentors
print(type(detectors.build(backbone)).__name__, type(segmentors.build(backbone)).__name__, ssm_models.__file__)
"""
    (tmp_path / "mine.py").write_text('custom_imports = dict(imports=["ssm_mm"], allow_failed_imports=False)\n')
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.stdout.split() == ["DenseVSSD", "DenseVSSD", str(site / "ssm_models/__init__.py")], done.stderr
