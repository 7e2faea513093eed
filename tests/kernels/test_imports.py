"""Fresh interpreters: what an import needs, prints and does first."""

import os
import subprocess
import sys

import pytest


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)


def test_ssm_ops_imports_torch_alone_and_prints_nothing():
    blocked = "triton timm numpy einops yacs ssm_models classification"
    done = python(
        f"""
import sys
import torch
before = set(sys.modules)
for name in {blocked.split()}:
    sys.modules.pop(name, None)
    sys.modules[name] = None
import ssm_ops
x = torch.randn(1, 2, 5)
y = ssm_ops.selective_scan(x, x, -torch.ones(2, 1), x[:, :1], x[:, :1], impl="reference")
assert y.shape == x.shape
new = {{name for name, module in sys.modules.items() if module is not None}} - before
ours = {{name.split(".")[0] for name in new}} - sys.stdlib_module_names
assert ours == {{"ssm_ops"}}, ours
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.full
def test_first_call_may_be_compiled():
    done = python(
        """
import torch, ssm_ops
x = torch.randn(1, 2, 5, requires_grad=True)
A = -torch.ones(2, 1)
scan = torch.compile(lambda x: ssm_ops.selective_scan(x, x, A, x[:, :1], x[:, :1]), fullgraph=True, backend="aot_eager")
scan(x).sum().backward()
print(x.grad.shape)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 2, 5])\n"


def test_default_implementation_comes_from_the_environment():
    code = "import ssm_ops._library as l; print(l.DEFAULT_IMPL)"
    assert python(code, SSM_OPS_IMPL="reference").stdout == "reference\n"
    bad = python(code, SSM_OPS_IMPL="fast")
    assert bad.returncode == 1 and "SSM_OPS_IMPL='fast' is not one of auto, reference, cpu, triton, cuda" in bad.stderr


@pytest.fixture(scope="module")
def doctor() -> str:
    done = subprocess.run([sys.executable, "-m", "ssm_ops"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("operator", ["selective_scan", "cross_scan", "cross_merge"])
def test_doctor_lists_every_implementation_of(operator, doctor):
    section = doctor.split(f"\n  {operator}: auto takes ", 1)[1].splitlines()[:5]
    assert [line.split()[0] for line in section[1:]] == ["reference", "cpu", "triton", "cuda"]
    assert section[1].split() == ["reference", "available"]
    for line in section[2:]:
        assert line.split()[1] == "available" or "no: " in line
