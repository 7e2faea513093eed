"""Every implementation on a GPU: numbers at real sizes, determinism, and how often a kernel is compiled."""

import itertools

import pytest
import torch

from ssm_ops import cross_merge, cross_scan, selective_scan
from ssm_ops._library import OPERATORS
from tests.kernels.common import implementations, rms_error, scan_inputs, to_dtype
from tests.kernels.triton_cases import *  # noqa: F403  the tests of that file, here on the GPU

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

# (batch, dim, length, state, options): VMamba's stages with N = 1 and 16, Vim, odd sizes, few and many channels
SCANS = {
    "stage1": (4, 4 * 96, 3136, 1, {"groups": 4}),
    "stage1_n16": (2, 4 * 96, 3136, 16, {"groups": 4}),
    "stage3": (4, 4 * 384, 196, 1, {"groups": 4}),
    "stage4": (4, 4 * 768, 49, 1, {"groups": 4}),
    "vim": (4, 384, 197, 16, {"z": True}),
    "detection": (1, 4 * 96, 200 * 336, 1, {"groups": 4}),
    "odd": (2, 33, 2049, 3, {"z": True, "bias": False}),
    "grouped_delta": (2, 96, 784, 8, {"groups": 2, "delta_dim": 24}),
    "wide_state": (1, 40, 300, 256, {}),
    "one_token": (2, 64, 1, 16, {"z": True}),
}

# (batch, channels, height, width)
MAPS = [(8, 96, 56, 56), (8, 384, 14, 14), (8, 768, 7, 7), (2, 96, 200, 336), (3, 33, 37, 19)]
FLAGS = list(itertools.product((True, False), (True, False), (True, False), ("cross2d", "unidi", "bidi")))
LAYOUTS = [(*f, torch.bfloat16) for f in FLAGS]
LAYOUTS += [(*f, dtype) for f in FLAGS if f[2:] == (False, "cross2d") for dtype in (torch.float32, torch.float16)]


def run_scan(inputs, dout, impl, **options):
    out, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, impl=impl, **options)
    out.backward(dout.to(out.dtype))
    return {"out": out, "last_state": last} | {f"d{n}": x.grad for n, x in inputs.items() if x is not None}


def to_gpu(inputs):
    return {n: x if x is None else x.cuda() for n, x in inputs.items()}


@DTYPES
@pytest.mark.parametrize("impl", implementations("selective_scan", "cuda"))
@pytest.mark.parametrize("case", SCANS.values(), ids=SCANS.keys())
def test_selective_scan(case, impl, dtype):
    """Error at most twice that of the reference in the same dtype, both against float64 on the same numbers."""
    *sizes, options = case
    made = to_gpu(scan_inputs(*sizes, **options))
    rounded = {n: x if x is None else x.to(dtype).double() for n, x in made.items()}
    dout = torch.randn(rounded["u"].shape, device="cuda").to(dtype).double()
    want = run_scan(to_dtype(rounded, torch.float64), dout, "reference")
    for out_dtype in (dtype, torch.float32):
        reference, got = (run_scan(to_dtype(rounded, dtype), dout, i, out_dtype=out_dtype) for i in ("reference", impl))
        for key, value in got.items():
            assert value.dtype == reference[key].dtype and value.shape == reference[key].shape
            assert rms_error(value, want[key]) <= 2 * rms_error(reference[key], want[key]) + 1e-6, key


@pytest.mark.parametrize("impl", implementations("selective_scan", "cuda"))
def test_selective_scan_with_step_sizes_in_float32(impl):
    made = to_gpu(scan_inputs(2, 24, 333, 2, groups=2, z=True))
    rounded = {n: x if n == "delta" else x.bfloat16().double() for n, x in made.items()}
    dout = torch.randn(rounded["u"].shape, device="cuda").bfloat16().double()
    want = run_scan(to_dtype(rounded, torch.float64), dout, "reference")
    given = to_dtype(rounded, torch.bfloat16) | {"delta": rounded["delta"].float().requires_grad_()}
    got = run_scan(given, dout, impl, out_dtype=torch.float32)
    assert got["ddelta"].dtype == torch.float32 and got["du"].dtype == got["dB"].dtype == torch.bfloat16
    for key, value in got.items():
        assert rms_error(value, want[key]) < (1e-5 if value.dtype == torch.float32 else 2**-8), key


@DTYPES
@pytest.mark.parametrize("impl", implementations("selective_scan", "cuda"))
def test_selective_scan_gives_the_same_bits_again(impl, dtype):
    rounded = to_gpu(scan_inputs(4, 4 * 96, 784, 4, groups=4, z=True))
    dout = torch.randn(rounded["u"].shape, device="cuda")
    first = run_scan(to_dtype(rounded, dtype), dout, impl)
    for _ in range(5):
        again = run_scan(to_dtype(rounded, dtype), dout, impl)
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("impl", implementations("selective_scan", "cuda"))
def test_selective_scan_writes_everything(impl):
    """Memory that is handed out next is full of NaN: what a kernel does not write shows."""
    made = to_gpu(scan_inputs(3, 72, 500, 2, groups=2, z=True))
    dout = torch.randn(made["u"].shape, device="cuda")
    torch.cuda.empty_cache()
    poison = [torch.full((n,), float("nan"), device="cuda") for n in (2**k for k in range(10, 24))]
    del poison
    for key, value in run_scan(to_dtype(made, torch.bfloat16), dout, impl).items():
        assert not value.isnan().any(), key


@pytest.mark.parametrize("impl", implementations("selective_scan", "cuda"))
def test_nan_in_nan_out(impl):
    inputs = to_dtype(to_gpu(scan_inputs(1, 20, 400, 2)), torch.float32)
    with torch.no_grad():
        inputs["u"][0, 3, 150] = float("nan")
    out = selective_scan(**inputs, delta_softplus=True, impl=impl)
    assert out[0, 3, 150:].isnan().all() and out.isnan().sum() == 250


@pytest.mark.parametrize("impl", implementations("cross_scan", "cuda"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cross_scan_and_merge(layout, impl):
    """The same bits as the reference: both sum in float32, in the same order."""
    *flags, dtype = layout
    for batch, channels, height, width in MAPS:
        four = (4,) if flags[2] else ()
        x = (batch, *four, channels, height, width) if flags[0] else (batch, height, width, *four, channels)
        y = (batch, 4, channels, height, width) if flags[1] else (batch, height, width, 4, channels)
        x, y = (torch.randn(shape, device="cuda").to(dtype) for shape in (x, y))
        assert torch.equal(cross_scan(x, *flags, impl=impl), cross_scan(x, *flags, impl="reference"))
        assert torch.equal(cross_merge(y, *flags, impl=impl), cross_merge(y, *flags, impl="reference"))


def versions(kernel) -> int:
    return len(kernel.device_caches[torch.cuda.current_device()][0])


def test_image_sizes_do_not_compile_again():
    scan, cross = (OPERATORS[name].find("triton").load() for name in ("selective_scan", "cross_scan"))
    kernels = (
        scan.selective_scan_fwd_kernel,
        scan.selective_scan_bwd_kernel,
        cross.cross_scan_kernel,
        cross.cross_merge_kernel,
    )

    def step(height, width):
        x = torch.randn(16, 48, height, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        inputs = to_dtype(to_gpu(scan_inputs(16, 4 * 48, height * width, 1, groups=4)), torch.bfloat16)
        inputs["u"] = cross_scan(x, impl="triton").flatten(1, 2)
        y = selective_scan(**inputs, delta_softplus=True, impl="triton")
        cross_merge(y.unflatten(1, (4, 48)).unflatten(3, (height, width)), impl="triton").sum().backward()

    step(56, 56)
    before = [versions(kernel) for kernel in kernels]
    for size in ((64, 64), (48, 72), (40, 128), (72, 56), (96, 104)):
        step(*size)
    assert [versions(kernel) for kernel in kernels] == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one():
    x = torch.randn(2, 8, 6, 5, device="cuda:1")
    assert torch.equal(cross_scan(x, impl="triton"), cross_scan(x, impl="reference"))
