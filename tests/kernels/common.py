"""What the operator tests share: the oracle, random inputs, and the error measure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ssm_ops._library import OPERATORS, why_unavailable

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")
TENSORS_OF_U = ("u", "delta", "B", "C", "z")


def implementations(operator: str, device: str = "cpu"):
    """Every implementation the operator has, as test parameters; those that cannot run here skip with the reason."""
    names = [implementation.name for implementation in OPERATORS[operator].implementations]
    reasons = {"auto": None} | {impl: why_unavailable(OPERATORS[operator], impl, device) for impl in names}
    return [pytest.param(i, marks=[pytest.mark.skip(reason=why)] if why else []) for i, why in reasons.items()]


def passed_under_the_interpreter(names: list[str], chosen: str) -> int:
    """How many tests passed, of files of this folder and what `-k` chooses, in a process that runs Triton kernels on
    the CPU; all have to."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.interpreter", "-k", chosen]
    done = subprocess.run(
        [*command, *(str(here / name) for name in names)],
        cwd=here.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    summary = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and "skipped" not in summary, summary
    return int(passed[1])


def loop_scan(u, delta, A, B, C, D=None, delta_bias=None, z=None, delta_softplus=False):
    """The definition of the selective scan, one token after the other. Shapes as `ssm_ops.selective_scan`."""
    dim, groups = u.shape[1], B.shape[1]
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = (F.softplus(delta) if delta_softplus else delta).repeat_interleave(dim // delta.shape[1], 1)
    B, C = (x.repeat_interleave(dim // groups, 1) for x in (B, C))  # (B, D, N, L)
    h, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for ut, dt, Bt, Ct in zip(u.unbind(2), delta.unbind(2), B.unbind(3), C.unbind(3), strict=True):
        h = torch.exp(dt[..., None] * A) * h + (dt * ut)[..., None] * Bt
        ys.append((h * Ct).sum(-1) if D is None else (h * Ct).sum(-1) + D * ut)
    y = torch.stack(ys, 2)
    return (y if z is None else y * F.silu(z)), h


def scan_inputs(batch, dim, length, n_state, groups=1, delta_dim=None, D=True, bias=True, z=False):
    """Random inputs of the size that trained models show, in float64, by name; absent ones are None."""
    delta_dim = delta_dim or dim
    made = {
        "u": torch.randn(batch, dim, length),
        "delta": 0.5 * torch.randn(batch, delta_dim, length) - 1,
        "A": -torch.rand(dim, n_state) - 0.1,
        "B": torch.randn(batch, groups, n_state, length),
        "C": torch.randn(batch, groups, n_state, length),
        "D": torch.randn(dim) if D else None,
        "delta_bias": 0.5 * torch.rand(delta_dim) if bias else None,
        "z": torch.randn(batch, dim, length) if z else None,
    }
    return {name: x if x is None else x.double() for name, x in made.items()}


def to_dtype(inputs: dict, dtype: torch.dtype) -> dict:
    """Inputs as the operator wants them for `dtype`: fresh leaves that need a gradient."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: None if x is None else x.to(dtype if name in TENSORS_OF_U else parameter).clone().requires_grad_()
        for name, x in inputs.items()
    }


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root-mean-square difference relative to the root-mean-square of `want`."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
