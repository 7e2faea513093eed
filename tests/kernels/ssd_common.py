"""What the tests of SSD, causal and not, share: the oracles, random inputs, and one run with all gradients."""

import pytest
import torch
import torch.nn.functional as F

from ssm_ops import nc_ssd, ssd_chunk_scan
from tests.kernels.common import implementations

BOTH = pytest.mark.parametrize(
    "function, impl",
    [
        pytest.param(function, *impl.values, marks=impl.marks)
        for function in (ssd_chunk_scan, nc_ssd)
        for impl in implementations(function.__name__)
    ],
)
TENSORS_OF_X = ("x", "dt", "B", "C")


def _steps(dt, dt_bias, dt_softplus):
    dt = dt if dt_bias is None else dt + dt_bias
    return F.softplus(dt) if dt_softplus else dt


def _skip(x, D):
    return 0 if D is None else x * (D if D.dim() == 2 else D[:, None])


def loop_ssd(x, dt, A, B, C, D=None, dt_bias=None, initial_states=None, dt_softplus=False):
    """The definition of the causal scan, one token after the other. Shapes as `ssm_ops.ssd_chunk_scan`."""
    heads, per_group = x.shape[2], x.shape[2] // B.shape[2]
    group = [j // per_group for j in range(heads)]
    dt, B, C = _steps(dt, dt_bias, dt_softplus), B[:, :, group], C[:, :, group]
    h = torch.zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=x.dtype) if initial_states is None else initial_states
    ys = []
    for t in range(x.shape[1]):
        new = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + new
        ys.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(ys, 1) + _skip(x, D), h


def loop_nc_ssd(x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, positive=True):
    """The definition of the non-causal form, one token after the other. Shapes as `ssm_ops.nc_ssd`."""
    group = [j % B.shape[2] for j in range(x.shape[2])]
    dt, B, C = _steps(dt, dt_bias, dt_softplus), B[:, :, group], C[:, :, group]
    weight = -dt * A if positive else dt * A
    state = sum((weight[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None] for t in range(x.shape[1]))
    return torch.stack([(state * C[:, t, :, None]).sum(-1) for t in range(x.shape[1])], 1) + _skip(x, D)


def ssd_inputs(batch, length, heads, head_dim, n_state, groups=1, D=1, bias=True, initial=False):
    """Random inputs of the size that trained models show, in float64, by name; absent ones are None."""
    made = {
        "x": torch.randn(batch, length, heads, head_dim),
        "dt": 0.5 * torch.randn(batch, length, heads) - 1,
        "A": -torch.rand(heads) - 0.1,
        "B": torch.randn(batch, length, groups, n_state),
        "C": torch.randn(batch, length, groups, n_state),
        "D": torch.randn((heads, head_dim)[:D]) if D else None,
        "dt_bias": 0.5 * torch.rand(heads) if bias else None,
    }
    if initial:
        made["initial_states"] = torch.randn(batch, heads, head_dim, n_state)
    return {name: t if t is None else t.double() for name, t in made.items()}


def leaves(inputs, dtype, of_x=TENSORS_OF_X):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        n: None if t is None else t.to(dtype if n in of_x else parameter).detach().clone().requires_grad_()
        for n, t in inputs.items()
    }


def run(function, inputs, **options):
    """Results, and all gradients of a fixed mixture of them whose factors are exact in every dtype."""
    results = function(**inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    factors = [(torch.randint(-8, 9, r.shape, generator=generator) / 4).to(r.dtype) for r in results]
    torch.autograd.backward(results, factors)
    named = dict(zip(("out", "final_states"), results, strict=False))
    return named | {f"d{n}": t.grad for n, t in inputs.items() if t is not None}
