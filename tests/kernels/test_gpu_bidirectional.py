"""bidirectional_scan on a GPU: numbers at the sizes of Vim, determinism, and how often a kernel is compiled."""

import pytest
import torch

from ssm_ops import _triton_routes as routes
from ssm_ops import bidirectional_scan
from tests.kernels.common import implementations, rms_error
from tests.kernels.test_bidirectional_scan import inputs, leaves, run
from tests.kernels.test_gpu_ss2d import versions
from tests.kernels.triton_bidirectional_cases import *  # noqa: F403  the tests of that file, here on the GPU

pytestmark = pytest.mark.gpu
IMPL = pytest.mark.parametrize("impl", implementations("bidirectional_scan", "cuda"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

# (batch, length, channels, state, rank): Vim-T and Vim-S, with stride 8, odd sizes, many programs
SIZES = {
    "tiny": (8, 197, 384, 16, 12),
    "small": (4, 197, 768, 16, 24),
    "stride8": (2, 730, 384, 16, 12),
    "odd": (3, 333, 33, 3, 17),
    "wide": (1, 40, 40, 256, 256),
    "many_programs": (64, 197, 160, 16, 6),
}


def made_on_gpu(*sizes):
    return {n: x.cuda() for n, x in inputs(*sizes).items()}


@DTYPES
@IMPL
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_real_sizes(sizes, impl, dtype):
    """Error at most twice that of the composition in the same dtype, both against float64 on the same numbers."""
    rounded = {n: x.to(dtype).double() for n, x in made_on_gpu(*sizes).items()}
    dout = torch.randn_like(rounded["x_forward"]).to(dtype).double()
    want = run(bidirectional_scan, leaves(rounded, torch.float64), dout, impl="reference")
    reference, got = (run(bidirectional_scan, leaves(rounded, dtype), dout, impl=i) for i in ("reference", impl))
    for key, value in got.items():
        assert value.dtype == reference[key].dtype and value.shape == reference[key].shape
        assert rms_error(value, want[key]) <= 2 * rms_error(reference[key], want[key]) + 2e-6, key


@DTYPES
@pytest.mark.parametrize("sizes", [SIZES["tiny"], SIZES["many_programs"]], ids=["two_programs", "one_program"])
def test_same_bits_again(sizes, dtype):
    made = made_on_gpu(*sizes)
    dout = torch.randn_like(made["x_forward"])
    first = run(bidirectional_scan, leaves(made, dtype), dout, impl="triton")
    for _ in range(5):
        again = run(bidirectional_scan, leaves(made, dtype), dout, impl="triton")
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_lengths_do_not_compile_again():
    kernels = routes.route_scan_fwd_kernel, routes.route_scan_bwd_kernel

    def step(batch, length):
        given = leaves(made_on_gpu(batch, length, 48, 16, 3), torch.bfloat16)
        bidirectional_scan(**given, out_dtype=torch.float32, impl="triton").sum().backward()

    step(2, 197)
    before = [versions(kernel) for kernel in kernels]
    for sizes in ((2, 196), (3, 64), (2, 1), (1, 730)):
        step(*sizes)
    assert [versions(kernel) for kernel in kernels] == before
