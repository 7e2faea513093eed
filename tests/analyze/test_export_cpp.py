"""docs/deploy: a C++ program without Python gives the logits of the model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from analyze.impl import export as impl
from tests.analyze.test_export import task

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


def test_the_program_is_short():
    assert len((DEPLOY / "predict.cpp").read_text().splitlines()) <= 80


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("program") / "predict"
    subprocess.run(
        ["bash", DEPLOY / "build.sh", built], env=os.environ | {"PYTHON": sys.executable}, check=True, timeout=300
    )
    return built


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano"])
def test_logits_of_a_package(name, program, tmp_path):
    of, path = task(name), tmp_path / "model.aoti.pt2"
    found = impl.write_compiled(of, path).differences
    assert max(difference.largest for difference in found) < 1e-5
    images = torch.randn(3, 3, *of.size)
    images.numpy().tofile(tmp_path / "images.f32")
    done = run(program, path, tmp_path / "images.f32", *images.shape)
    assert (done.returncode, done.stderr) == (0, "")
    logits = torch.from_numpy(np.loadtxt(done.stdout.splitlines(), dtype=np.float32))
    with torch.inference_mode():
        torch.testing.assert_close(logits, of.eager(images), rtol=0, atol=1e-5)


def test_mistakes_take_one_line(program, tmp_path):
    (tmp_path / "few.f32").write_bytes(b"1234")
    done = run(program, "model.aoti.pt2", tmp_path / "few.f32", 1, 3, 8, 8)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}/few.f32 does not hold 192 numbers\n")
    assert run(program).stderr.startswith("usage: ")
