"""The CUDA sources compile for a Hopper GPU, and their kernels keep to registers. Needs nvcc, but no GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "kernels" / "csrc" / "cuda").glob("selective_scan_*.cu"))
SPILLS = 64
"""Bytes a kernel may spill: values used once per tile, outside of the loop over the states."""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def test_there_is_one_source_per_direction_and_dtype():
    names = {f"selective_scan_{d}_{t}" for d in ("forward", "backward") for t in ("float32", "float16", "bfloat16")}
    assert names <= {source.stem for source in SOURCES}


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc in CUDA_HOME or on the PATH")
@pytest.mark.parametrize(
    "source",
    # the dtypes differ in loads and stores alone
    [pytest.param(s, id=s.stem, marks=[] if "bfloat16" in s.stem else pytest.mark.full) for s in SOURCES],
)
def test_compiles_without_spills_in_the_loops(source, tmp_path):
    command = [find_nvcc(), "-O3", "-std=c++17", "-arch=sm_90", "-Xptxas", "-v", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "a.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stores = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert stores, done.stderr
    assert max(stores) <= SPILLS, done.stderr
