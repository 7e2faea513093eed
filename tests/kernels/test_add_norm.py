"""Addition and norm in one pass: against PyTorch's in float64, for every dtype; where it gives way to the reference."""

import pytest
import torch
import torch.nn.functional as F

from ssm_ops import add_norm
from ssm_ops._library import OPERATORS, why_unavailable
from tests.kernels.common import implementations, rms_error

IMPL = pytest.mark.parametrize("impl", implementations("add_norm"))
HALF = (torch.float16, torch.bfloat16)
CPU = why_unavailable(OPERATORS["add_norm"], "cpu", "cpu")
needs_library = pytest.mark.skipif(CPU is not None, reason=str(CPU))


def exact(x, branch, weight, bias, eps, rms):
    total = x.double() if branch is None else x.double() + branch.double()
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    if rms:
        normed = F.rms_norm(total, x.shape[-1:], weight, eps)
        return total, normed if bias is None else normed + bias
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, eps)


@IMPL
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 16), (1, 4, 3, 96), (5, 100), (2, 33)], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32, torch.float32)]
    + [(torch.float32, half, out) for half in HALF for out in (half, torch.float32)]
    + [(half, half, half) for half in HALF]
    + [(torch.float32, None, torch.bfloat16), (torch.bfloat16, None, torch.float32)],
    ids=str,
)
def test_against_float64(dtypes, shape, rms, impl):
    of_x, of_branch, out_dtype = dtypes
    x = (2 * torch.randn(shape) + 1).to(of_x)
    branch = None if of_branch is None else torch.randn(shape).to(of_branch)
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    for parameters in ((weight, bias), (weight, None), (None, None)):
        total, normed = add_norm(x, branch, *parameters, eps=1e-5, rms=rms, out_dtype=out_dtype, impl=impl)
        right_total, right = exact(x, branch, *parameters, 1e-5, rms)
        assert normed.dtype == out_dtype and normed.shape == x.shape
        assert total.dtype == (of_x if branch is None else torch.promote_types(of_x, of_branch))
        assert total is x if branch is None else torch.equal(total, right_total.float().to(total.dtype))
        assert rms_error(normed, right) <= 2 * rms_error(right.to(out_dtype), right) + 1e-6


@needs_library
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number_of_half_precision_is_read_and_written(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    total, _ = add_norm(every, torch.zeros_like(every), None, impl="cpu")
    want = every + 0  # -0 + 0 is 0, in both
    assert torch.equal(total.isnan(), want.isnan())
    assert torch.equal(total[~want.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


@needs_library
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_are_rounded_as_pytorch_rounds(dtype):
    bits = torch.randint(-(1 << 15), 1 << 15, (2, 512, 512), dtype=torch.int32).to(torch.int16)
    x, branch = bits.view(dtype)
    total, _ = add_norm(x, branch, None, impl="cpu")
    want = (x.float() + branch.float()).to(dtype)
    finite = ~want.isnan()
    assert torch.equal(total.isnan(), want.isnan()) and torch.equal(total[finite], want[finite])


@needs_library
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_no_tokens(shape):
    total, normed = add_norm(torch.randn(shape), torch.randn(shape), torch.ones(8), impl="cpu")
    assert total.shape == normed.shape == shape


@needs_library
def test_rows_far_from_zero_keep_their_variance():
    """As 1e4 + noise: the variance is formed from differences to the mean, not from squares."""
    x = 1e4 + torch.randn(7, 96)
    _, normed = add_norm(x, None, None, impl="cpu")
    torch.testing.assert_close(normed.double(), exact(x, None, None, None, 1e-5, False)[1], rtol=1e-3, atol=2e-3)


@needs_library
def test_where_a_derivative_is_wanted_it_is_the_reference():
    x, branch = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(6, requires_grad=True)
    for rms in (False, True):
        total, normed = add_norm(x, branch, weight, rms=rms)
        grads = torch.autograd.grad((total.sin() + normed.cos()).sum(), (x, branch, weight))
        right = exact(x, branch, weight, None, 1e-5, rms)
        wanted = torch.autograd.grad((right[0].sin() + right[1].cos()).sum(), (x, branch, weight))
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="no derivatives and cannot be traced"):
            add_norm(x, branch, weight, rms=rms, impl="cpu")
        with torch.no_grad():  # nobody wants one here
            add_norm(x, branch, weight, rms=rms, impl="cpu")


def test_gradcheck_of_the_reference():
    x, branch, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (2, 5), 5, 5))
    for rms in (False, True):
        assert torch.autograd.gradcheck(lambda *a, rms=rms: add_norm(*a, rms=rms), (x, branch, weight, bias))


def test_compiles_and_counts_as_plain_pytorch():
    x, branch, weight = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    with torch.no_grad():
        compiled = torch.compile(add_norm, fullgraph=True, backend="aot_eager")(x, branch, weight)
        for got, want in zip(compiled, add_norm(x, branch, weight), strict=True):
            torch.testing.assert_close(got, want)
        exported = torch.export.export(Call(), (x, branch, weight)).graph_module.code
    assert "layer_norm" in exported and "ssm_ops" not in exported


class Call(torch.nn.Module):
    def forward(self, *args):
        return add_norm(*args)


def test_bad_arguments_are_named():
    x = torch.randn(2, 3)
    for args, message in (
        ((x, torch.randn(2, 2), None), r"branch must be \(2, 3\) for x"),
        ((x, None, torch.randn(2)), r"weight must be \(3,\) for x"),
        ((x, None, torch.ones(3, dtype=torch.int32)), "weight must be torch.float32 or .* got torch.int32"),
        ((x.int(), None, None), "x is torch.int32"),
        ((torch.randn(2, 0), None, None), r"x must be \(..., C\) with C > 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            add_norm(*args)
    with pytest.raises(RuntimeError, match="add_norm has no triton implementation"):
        add_norm(x, None, None, impl="triton")
