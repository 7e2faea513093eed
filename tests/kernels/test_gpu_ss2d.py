"""ss2d_scan on a GPU: numbers at real sizes, determinism, and how often a kernel is compiled."""

import pytest
import torch

from ssm_ops import _triton_routes as routes
from ssm_ops import ss2d_scan
from ssm_ops._library import OPERATORS
from tests.kernels.common import implementations, rms_error
from tests.kernels.test_ss2d_scan import inputs, leaves, run
from tests.kernels.triton_ss2d_cases import *  # noqa: F403  the tests of that file, here on the GPU

pytestmark = pytest.mark.gpu
IMPL = pytest.mark.parametrize("impl", implementations("ss2d_scan", "cuda"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

# (batch, channels, height, width, state, rank): the stages of VMamba-T, of its first version, detection, odd sizes
SIZES = {
    "stage1": (8, 192, 56, 56, 1, 6),
    "stage2": (8, 384, 28, 28, 1, 12),
    "stage3": (8, 768, 14, 14, 1, 24),
    "stage4": (8, 1536, 7, 7, 1, 48),
    "stage1_n16": (2, 192, 56, 56, 16, 6),
    "stage4_n16": (8, 1536, 7, 7, 16, 48),
    "detection": (1, 96, 200, 336, 1, 6),
    "odd": (3, 33, 37, 19, 3, 17),
    "wide": (2, 40, 9, 31, 256, 256),
    "many_programs": (64, 160, 14, 14, 1, 6),
}


def made_on_gpu(*sizes):
    return {n: x.cuda() for n, x in inputs(*sizes).items()}


def channels_last(given):
    x = given["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return given | {"x": x}


@DTYPES
@IMPL
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_real_sizes(sizes, impl, dtype):
    """Error at most twice that of the composition in the same dtype, both against float64 on the same numbers."""
    rounded = {n: x.to(dtype).double() for n, x in made_on_gpu(*sizes).items()}
    dout = torch.randn_like(rounded["x"]).to(dtype).double()
    want = run(leaves(rounded, torch.float64), dout, "reference")
    reference = run(leaves(rounded, dtype), dout, "reference")
    for given in (leaves(rounded, dtype), channels_last(leaves(rounded, dtype))):
        got = run(given, dout, impl)
        for key, value in got.items():
            assert value.dtype == reference[key].dtype and value.shape == reference[key].shape
            assert rms_error(value, want[key]) <= 2 * rms_error(reference[key], want[key]) + 2e-6, key


@DTYPES
@pytest.mark.parametrize("sizes", [SIZES["stage1"], SIZES["many_programs"]], ids=["ways", "one_way"])
def test_same_bits_again(sizes, dtype):
    made = made_on_gpu(*sizes)
    dout = torch.randn_like(made["x"])
    first = run(channels_last(leaves(made, dtype)), dout, "triton")
    for _ in range(5):
        again = run(channels_last(leaves(made, dtype)), dout, "triton")
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_nan_in_nan_out():
    given = leaves(made_on_gpu(1, 96, 56, 56, 1, 6), torch.bfloat16)
    with torch.no_grad():
        given["x"][0, 5, 30, 7] = float("nan")
    bad = ss2d_scan(**given, impl="triton").isnan()[0]
    # every pixel lies behind that one on a route over the rows, before or after it
    assert bad[5].all() and bad.sum() == 56 * 56


def versions(kernel) -> int:
    return len(kernel.device_caches[torch.cuda.current_device()][0])


def test_image_sizes_do_not_compile_again():
    module = OPERATORS["ss2d_scan"].find("triton").load()
    kernels = (module.pixels_kernel, routes.route_scan_fwd_kernel, routes.route_scan_bwd_kernel)

    def step(batch, height, width):
        given = channels_last(leaves(made_on_gpu(batch, 48, height, width, 1, 3), torch.bfloat16))
        ss2d_scan(**given, out_dtype=torch.float32, impl="triton").sum().backward()

    step(2, 56, 56)
    before = [versions(kernel) for kernel in kernels]
    for sizes in ((2, 64, 64), (3, 48, 72), (2, 1, 37), (1, 17, 1), (4, 7, 7)):
        step(*sizes)
    assert [versions(kernel) for kernel in kernels] == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one():
    given = {n: x.detach().to("cuda:1") for n, x in leaves(inputs(2, 20, 6, 5, 1, 3), torch.float32).items()}
    want = ss2d_scan(**given, impl="reference")
    assert rms_error(ss2d_scan(**given, impl="triton"), want) < 2e-6
