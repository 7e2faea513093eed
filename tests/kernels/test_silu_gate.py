"""The gate y silu(z) scale: against its formula in float64, finite differences, and what it promises to PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from ssm_ops import silu_gate
from ssm_ops._library import resolve
from ssm_ops.silu_gate import api
from tests.kernels.common import implementations, rms_error

IMPL = pytest.mark.parametrize("impl", implementations("silu_gate"))
SIZES = [(1, 1, 1), (2, 7, 5), (1, 49, 16), (3, 5, 64), (2, 3, 65), (1, 70, 100), (2, 197, 48)]


def inputs(batch, length, dim, dtype=torch.float64):
    """y, and z as half of a wider tensor, as a mixer has them; of one sample z is half of its rows."""
    y, wide = torch.randn(batch, length, dim, dtype=dtype), torch.randn(batch, length, 2 * dim, dtype=dtype) * 3
    return y, wide.chunk(2, dim=2)[1]


@IMPL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients_against_the_formula(size, dtype, impl):
    if impl == "cpu" and dtype == torch.float64:
        pytest.skip("the library has no float64")
    exact = inputs(*size)
    y, z = (t.to(dtype).requires_grad_() for t in exact)
    wide_y, wide_z = (t.detach().double().requires_grad_() for t in (y, z))
    dout = torch.randn(size, dtype=torch.float64).to(dtype)
    got = silu_gate(y, z, scale=0.5, impl=impl)
    assert got.dtype == dtype and got.is_contiguous()
    want = wide_y * F.silu(wide_z) * 0.5
    grads = torch.autograd.grad(got, (y, z), dout)
    wanted = torch.autograd.grad(want, (wide_y, wide_z), dout.double())
    for found, right in ((got, want), *zip(grads, wanted, strict=True)):
        assert found.dtype == dtype
        rounded = rms_error(right.to(dtype), right)  # one rounding of the exact result, and nothing worse than two
        assert rms_error(found, right) <= 2 * rounded + 3e-7


@IMPL
def test_extreme_gates(impl):
    z = torch.tensor([-200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, float("nan")]).expand(1, 3, 8)
    y = torch.full((1, 3, 8), 2.0)
    got, want = silu_gate(y, z, impl=impl), 2 * F.silu(z.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded"])
def test_any_strides(layout):
    y, z = inputs(2, 6, 40, torch.float32)
    given = {
        "transposed": (y.mT.contiguous().mT, z.mT.contiguous().mT),
        "every second": (y, torch.stack([z, z], 3).flatten(2)[..., ::2]),
        "expanded": (y, z[:1].expand_as(z)),
    }[layout]
    torch.testing.assert_close(silu_gate(*given), silu_gate(*(t.contiguous() for t in given)), rtol=0, atol=0)


def test_empty_batch_has_empty_gradients():
    y, z = (torch.randn(0, 4, 8, requires_grad=True) for _ in range(2))
    out = silu_gate(y, z)
    assert out.shape == (0, 4, 8)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (y, z))] == [y.shape, z.shape]


@IMPL
def test_the_same_bits_whatever_the_number_of_threads(impl):
    y, z = inputs(2, 301, 72, torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(silu_gate(y, z, impl=impl))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_gradcheck_of_the_reference_twice():
    y, z = (t.requires_grad_() for t in inputs(1, 3, 4))
    assert torch.autograd.gradcheck(lambda *a: silu_gate(*a, scale=0.5), (y, z))
    assert torch.autograd.gradgradcheck(lambda *a: silu_gate(*a, scale=0.5), (y, z))


def test_shapes_alone():
    with torch.no_grad():
        assert silu_gate(*(t.to("meta") for t in inputs(2, 5, 24, torch.float32))).shape == (2, 5, 24)


def test_opcheck():
    impl = resolve(api.SILU_GATE, "auto", torch.device("cpu"), torch.float32)
    y, z = inputs(2, 5, 24, torch.float32)
    torch.library.opcheck(api.silu_gate_fwd, (y, z, 0.5, impl))
    torch.library.opcheck(api.silu_gate_bwd, (torch.randn_like(y), y, z, 0.5, impl))


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(silu_gate, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in ((5, 6, 9), (3, 5, 7), (2, 20, 14), (7, 9, 8)):
        y, z = (t.clone().requires_grad_() for t in inputs(*size, torch.float32))
        got, want = (torch.autograd.grad(f(y, z).sin().sum(), (y, z)) for f in (compiled, silu_gate))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_bad_arguments_are_named():
    y, z = inputs(1, 2, 3, torch.float32)
    for args, message in (
        ((y[0], z[0]), r"y must be \(B, L, D\), got \(2, 3\)"),
        ((y, z[..., :2]), r"z must be \(1, 2, 3\) for y"),
        ((y, z.double()), "z must be torch.float32 beside y"),
        ((y.int(), z), "y is torch.int32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            silu_gate(*args)
