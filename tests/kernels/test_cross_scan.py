"""Numbers of cross scan and cross merge: recorded outputs of the official kernel, adjointness, round trips, errors."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_ops import cross_merge, cross_scan
from tests.kernels.common import implementations

STORED = np.load(Path(__file__).parent.parent / "data" / "ops" / "cross_scan_merge.npz")
IMPL = pytest.mark.parametrize("impl", implementations("cross_scan"))
FLAGS = list(itertools.product((True, False), (True, False), (True, False), ("cross2d", "unidi", "bidi")))


def sizes(in_first, out_first, one_by_one, batch=2, channels=3, height=7, width=5):
    """Shapes of the map(s), of the routes as a merge takes them, and of both results."""
    four, length = (4,) if one_by_one else (), height * width
    maps = (batch, *four, channels, height, width) if in_first else (batch, height, width, *four, channels)
    routes = (batch, 4, channels, height, width) if out_first else (batch, height, width, 4, channels)
    scanned = (batch, 4, channels, length) if out_first else (batch, length, 4, channels)
    merged = (batch, *four, channels, length) if in_first else (batch, length, *four, channels)
    return maps, routes, scanned, merged


@IMPL
@pytest.mark.parametrize("case", sorted({name.split("/")[0] for name in STORED.files}))
def test_recorded_outputs_of_the_official_kernel(case, impl):
    op, in_first, out_first, mode, scans = case.split("_")
    x = torch.from_numpy(STORED[f"{case}/x"]).double().requires_grad_()
    operator = cross_scan if op == "scan" else cross_merge
    flags = (in_first == "inCF", out_first == "outCF", mode == "1b1", int(scans[1:]))
    y = operator(x, *flags, impl=impl)
    y.backward(torch.from_numpy(STORED[f"{case}/dy"]).double())
    np.testing.assert_array_equal(y.detach().numpy(), STORED[f"{case}/y"])
    np.testing.assert_array_equal(x.grad.numpy(), STORED[f"{case}/dx"])


@IMPL
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_scan_and_merge_are_adjoint(flags, impl):
    """<scan(x), y> == <x, merge(y)>, exactly: the numbers are small integers. So are the gradients."""
    maps, routes, scanned, merged = sizes(*flags[:3])
    x = torch.randint(-9, 9, maps).double().requires_grad_()
    y = torch.randint(-9, 9, routes).double().requires_grad_()
    s, m = cross_scan(x, *flags, impl=impl), cross_merge(y, *flags, impl=impl)
    assert s.shape == scanned and m.shape == merged and s.is_contiguous() and m.is_contiguous()
    assert torch.equal((s * y.reshape(scanned)).sum(), (x.reshape(merged) * m).sum())
    assert torch.equal(torch.autograd.grad(s, x, y.detach().reshape(scanned))[0], m.detach().reshape(maps))
    assert torch.equal(torch.autograd.grad(m, y, x.detach().reshape(merged))[0], s.detach().reshape(routes))


@IMPL
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_adjoint_by_finite_differences(flags, impl):
    maps, routes, _, _ = sizes(*flags[:3], batch=1, channels=1, height=2, width=3)
    x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (maps, routes))
    assert torch.autograd.gradcheck(lambda x: cross_scan(x, *flags, impl=impl), x)
    assert torch.autograd.gradcheck(lambda y: cross_merge(y, *flags, impl=impl), y)


@IMPL
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_round_trip(flags, impl):
    """Merging what was scanned gives four times the map (the map itself, one by one)."""
    maps, routes, _, merged = sizes(*flags[:3])
    x = torch.randint(-9, 9, maps).float()
    back = cross_merge(cross_scan(x, *flags, impl=impl).reshape(routes), *flags, impl=impl)
    assert torch.equal(back, (1 if flags[2] else 4) * x.reshape(merged))


def test_order_of_the_routes():
    x = torch.arange(6).view(1, 1, 2, 3)
    expected = {
        "cross2d": [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]],
        "unidi": [[0, 1, 2, 3, 4, 5]] * 4,
        "bidi": [[0, 1, 2, 3, 4, 5]] * 2 + [[5, 4, 3, 2, 1, 0]] * 2,
    }
    for number, (name, routes) in enumerate(expected.items()):
        assert cross_scan(x, scans=name)[0, :, 0].tolist() == routes
        assert cross_scan(x, scans=number)[0, :, 0].tolist() == routes


@IMPL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(dtype, impl):
    y = torch.randn(2, 4, 8, 6, 5).to(dtype)
    exact = cross_merge(y.double(), impl=impl)
    assert torch.equal(cross_merge(y, impl=impl), exact.to(dtype))


@IMPL
def test_non_contiguous_input(impl):
    x = torch.randn(2, 7, 5, 3).permute(0, 3, 1, 2)
    assert torch.equal(cross_scan(x, impl=impl), cross_scan(x.contiguous(), impl="reference"))


@IMPL
@pytest.mark.parametrize("flags", [f for f in FLAGS if f[3] == "cross2d"], ids=str)
def test_one_channel(flags, impl):
    """Here a stride of 1 says nothing about which axis is contiguous."""
    maps, routes = sizes(*flags[:3], channels=1)[:2]
    for operator, shape in ((cross_scan, maps), (cross_merge, routes)):
        x = torch.randn(shape)
        assert torch.equal(operator(x, *flags, impl=impl), operator(x, *flags, impl="reference"))


COMPILED = pytest.mark.parametrize("impl", [p for p in implementations("cross_scan") if p.values == ("cpu",)])
# (batch, channels, height, width): one and several tiles, with and without remainders, blocks of 16, 8, 4 and single
# numbers, one channel, no sample
SIZES = [(2, 40, 14, 14), (1, 17, 33, 70), (1, 1030, 3, 2), (3, 1, 5, 9), (2, 40, 1, 9), (2, 3, 65, 1), (0, 3, 4, 5)]


def spread(x, *, stride=1, start=0):
    """The same numbers at other places in memory: every `stride`-th along each dimension, the first at `start`."""
    padded = x.new_full([start + stride * n for n in x.shape], float("nan"))
    view = padded[tuple(slice(start, start + stride * n, stride) for n in x.shape)]
    return view.copy_(x)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_compiled_has_the_bits_of_the_reference(flags, dtype, impl):
    """At sizes that need every path, for any strides."""
    for size in SIZES:
        maps, routes = sizes(*flags[:3], *size)[:2]
        for operator, shape in ((cross_scan, maps), (cross_merge, routes)):
            x = torch.randn(shape).to(dtype)
            want = operator(x, *flags, impl="reference")
            turned = x.transpose(1, -1).contiguous().transpose(1, -1)
            for same in (x, turned, spread(x, start=1), spread(x, stride=2)):
                got = operator(same, *flags, impl=impl)
                assert got.is_contiguous() and got.dtype == dtype and torch.equal(got, want), (size, same.stride())


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiled_merges_all_numbers_of_half_precision(dtype, impl):
    """All 65536, infinities, NaN and subnormal numbers among them."""
    y = torch.arange(2**16).to(torch.uint16).view(dtype)[torch.randperm(2**16)].view(1, 4, 64, 16, 16)
    got, want = (cross_merge(y, impl=i) for i in (impl, "reference"))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@COMPILED
def test_compiled_does_not_depend_on_the_threads(impl):
    x = torch.randn(2, 100, 37, 19)
    y = torch.randn(2, 4, 100, 37, 19)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append((cross_scan(x, True, False, impl=impl), cross_merge(y, False, True, impl=impl)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cross_scan(torch.zeros(2, 3, 4)), "x must have 4 dimensions, got (2, 3, 4)"),
        (lambda: cross_scan(torch.zeros(2, 3, 3, 4, 5), one_by_one=True), "dimension 1 of x holds the 4 routes"),
        (lambda: cross_merge(torch.zeros(2, 4, 3, 4)), "y must have 5 dimensions"),
        (
            lambda: cross_merge(torch.zeros(2, 4, 4, 3, 3), out_channel_first=False),
            "dimension 3 of y holds the 4 routes",
        ),
        (lambda: cross_scan(torch.zeros(2, 3, 4, 5), scans="zigzag"), "scans='zigzag' is not one of 0 'cross2d'"),
        (lambda: cross_scan(torch.zeros(2, 3, 4, 5), scans=3), "scans=3 is not one of"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
