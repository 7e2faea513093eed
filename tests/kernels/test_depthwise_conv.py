"""The depthwise convolution in one pass: against PyTorch in float64, for every dtype; where it is the reference."""

import pytest
import torch
import torch.nn.functional as F

from ssm_ops import depthwise_conv
from ssm_ops._library import OPERATORS, why_unavailable
from tests.kernels.common import implementations, rms_error

IMPL = pytest.mark.parametrize("impl", implementations("depthwise_conv"))
CPU = why_unavailable(OPERATORS["depthwise_conv"], "cpu", "cpu")
needs_library = pytest.mark.skipif(CPU is not None, reason=str(CPU))


def exact(x, weight, bias, activation):
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3]).permute(0, 2, 3, 1)
    return F.silu(y) if activation else y


def parameters(channels, dtype=torch.float32):
    return torch.randn(channels, 1, 3, 3).to(dtype), torch.randn(channels).to(dtype)


@IMPL
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 1, 9, 16), (2, 6, 1, 33), (1, 4, 4, 64), (2, 5, 8, 100)], ids=str
)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_against_float64(dtypes, shape, activation, impl):
    of_x, of_weight, out_dtype = dtypes
    x, (weight, bias) = torch.randn(shape).to(of_x), parameters(shape[3], of_weight)
    for given in (bias, None):
        y = depthwise_conv(x, weight, given, activation=activation, out_dtype=out_dtype, impl=impl)
        right = exact(x, weight, given, activation)
        assert y.dtype == out_dtype and y.shape == x.shape and y.is_contiguous()
        assert rms_error(y, right) <= 2 * rms_error(right.to(out_dtype), right) + 1e-6


@IMPL
def test_any_strides(impl):
    """A part of a wider map, every second row and column of it, and a map in the memory of NCHW."""
    wide, (weight, bias) = torch.randn(2, 9, 10, 70), parameters(40)
    for x in (wide[..., 20:60], wide[:, ::2, 1::2, :40], torch.randn(2, 40, 5, 6).permute(0, 2, 3, 1)):
        y = depthwise_conv(x, weight, bias, activation="silu", impl=impl)
        torch.testing.assert_close(y.double(), exact(x, weight, bias, "silu"), rtol=1e-5, atol=1e-5)


@needs_library
def test_what_lies_beside_a_pixel_stays_there():
    """Infinities reach their neighbours and no others, at the borders too, and no samples."""
    weight, bias = parameters(17)
    for h, w in ((0, 0), (0, 3), (2, 6), (4, 6)):
        x = torch.randn(3, 5, 7, 17)
        want = depthwise_conv(x, weight, bias, impl="cpu")
        x[1, h, w] = torch.inf
        y = depthwise_conv(x, weight, bias, impl="cpu")
        near = torch.zeros(3, 5, 7, dtype=torch.bool)
        near[1, max(h - 1, 0) : h + 2, max(w - 1, 0) : w + 2] = True
        assert not y[near].isfinite().any() and torch.equal(y[~near], want[~near])


@needs_library
def test_any_number_of_threads_gives_the_same_bits():
    x, (weight, bias), results = torch.randn(2, 7, 9, 50), parameters(50), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(depthwise_conv(x, weight, bias, activation="silu", impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results)


def test_where_a_derivative_is_wanted_it_is_the_reference():
    x, (weight, bias) = torch.randn(2, 4, 5, 6, requires_grad=True), parameters(6)
    weight.requires_grad_()
    got = torch.autograd.grad(depthwise_conv(x, weight, bias, activation="silu").sin().sum(), (x, weight))
    want = torch.autograd.grad(exact(x, weight, bias, "silu").sin().sum(), (x, weight))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if CPU is None:
        with pytest.raises(RuntimeError, match="no derivatives and cannot be traced"):
            depthwise_conv(x, weight, bias, impl="cpu")


def test_gradcheck_of_the_reference():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 2, 2), (2, 1, 3, 3), 2)]
    assert torch.autograd.gradcheck(lambda *a: depthwise_conv(*a, activation="silu"), inputs)


def test_compiles_as_plain_pytorch():
    x, (weight, bias) = torch.randn(1, 4, 4, 16), parameters(16)
    with torch.no_grad():
        compiled = torch.compile(depthwise_conv, fullgraph=True, backend="aot_eager")(x, weight, bias)
        torch.testing.assert_close(compiled, depthwise_conv(x, weight, bias))


def test_no_samples():
    assert depthwise_conv(torch.randn(0, 3, 3, 8), *parameters(8)).shape == (0, 3, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, "activation='relu' is neither None nor 'silu'"),
        ({"x": torch.randn(2, 3, 4)}, ValueError, r"x must be \(B, H, W, C\) with at least one pixel, got \(2, 3, 4\)"),
        ({"x": torch.ones(1, 2, 2, 8, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"weight": torch.randn(8, 1, 5, 5)}, ValueError, r"weight must be \(8, 1, 3, 3\).*got \(8, 1, 5, 5\)"),
        ({"bias": torch.randn(4)}, ValueError, r"bias must be \(8,\).*got \(4,\)"),
        ({"impl": "triton"}, RuntimeError, "depthwise_conv has no triton implementation"),
    ],
)
def test_bad_input_is_named(change, error, message):
    weight, bias = parameters(8)
    with pytest.raises(error, match=message):
        depthwise_conv(**{"x": torch.randn(1, 2, 2, 8), "weight": weight, "bias": bias} | change)
