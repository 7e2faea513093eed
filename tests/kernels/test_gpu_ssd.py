"""SSD and the causal convolution in Triton on a GPU: numbers at real sizes, determinism, compilations."""

import pytest
import torch

from ssm_ops import causal_conv1d, ssd_chunk_scan
from ssm_ops._library import OPERATORS
from tests.kernels.ssd_common import leaves, ssd_inputs
from tests.kernels.triton_ssd_cases import *  # noqa: F403  the tests of that file, here on the GPU
from tests.kernels.triton_ssd_cases import DTYPES, check_convolution, check_ssd, on_device, run

pytestmark = pytest.mark.gpu

# (batch, length, heads, head_dim, state), options of the inputs, chunk: Mamba-2 in VMamba's stages, and odd sizes
MAMBA2 = {
    "stage1": ((2, 3136, 6, 32, 64), {}, 64),
    "stage1_n1": ((2, 3136, 6, 32, 1), {"groups": 1}, 64),
    "stage1_p64": ((1, 3136, 6, 64, 128), {"D": 2}, 64),
    "stage1_long_chunks": ((1, 3136, 6, 64, 64), {"initial": True}, 256),
    "stage2": ((2, 784, 12, 32, 64), {"groups": 2}, 64),
    "many_heads": ((1, 3136, 24, 64, 64), {}, 64),
    "stage4": ((4, 49, 24, 64, 64), {}, 64),
    "odd": ((2, 197, 3, 37, 5), {"D": 0, "bias": False}, 50),
    "largest_state": ((1, 100, 2, 16, 256), {}, 64),
}

# (batch, channels, length, taps): Vim, and odd sizes
VIM = {"tiny": (8, 384, 197, 4), "small": (4, 768, 197, 4), "dense": (1, 384, 12544, 4), "odd": (2, 33, 1001, 3)}


@DTYPES
@pytest.mark.parametrize("case", MAMBA2.values(), ids=MAMBA2.keys())
def test_ssd_at_real_sizes(case, dtype):
    check_ssd(case, dtype)


@DTYPES
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("sizes", VIM.values(), ids=VIM.keys())
def test_convolution_at_real_sizes(sizes, reverse, dtype):
    check_convolution(sizes, dtype, reverse)


def made(batch, length, dtype):
    inputs = leaves(on_device(ssd_inputs(batch, length, 6, 32, 16), dtype), dtype)
    weight = torch.randn(192, 4, device="cuda").to(dtype).requires_grad_()
    return inputs, {"x": torch.randn(batch, 192, length, device="cuda").to(dtype).requires_grad_(), "weight": weight}


def step(batch, length, dtype):
    """Results and gradients of both operators."""
    torch.manual_seed(1)
    inputs, convolved = made(batch, length, dtype)
    factor = [torch.randn(inputs["x"].shape, device="cuda")]
    scanned = run(ssd_chunk_scan, inputs, factor, dt_softplus=True, impl="triton")
    factor = [torch.randn(convolved["x"].shape, device="cuda")]
    return scanned | {f"conv_{k}": v for k, v in run(causal_conv1d, convolved, factor, impl="triton").items()}


@DTYPES
def test_the_same_bits_again(dtype):
    first = step(4, 784, dtype)
    for _ in range(5):
        again = step(4, 784, dtype)
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_everything_is_written():
    """Memory that is handed out next is full of NaN: what a kernel does not write shows."""
    torch.cuda.empty_cache()
    poison = [torch.full((n,), float("nan"), device="cuda") for n in (2**k for k in range(10, 24))]
    del poison
    for key, value in step(3, 500, torch.bfloat16).items():
        assert not value.isnan().any(), key


def test_image_sizes_do_not_compile_again():
    ssd, conv = (OPERATORS[name].find("triton").load() for name in ("ssd_chunk_scan", "causal_conv1d"))
    kernels = (
        ssd.ssd_step_kernel,
        ssd.ssd_state_kernel,
        ssd.ssd_out_kernel,
        ssd.ssd_input_grad_kernel,
        ssd.ssd_projection_grad_kernel,
        conv.causal_conv1d_kernel,
        conv.causal_conv1d_grad_kernel,
    )

    def versions():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    step(2, 3136, torch.bfloat16)
    before = versions()
    for batch, length in ((16, 784), (1, 4097), (3, 1000), (2, 197)):
        step(batch, length, torch.bfloat16)
    assert versions() == before
