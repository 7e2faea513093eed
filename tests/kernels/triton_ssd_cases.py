"""Tests of the Triton kernels of SSD and of the causal convolution beyond those of every implementation.

Not collected by name. They run under Triton's interpreter, started by test_triton.py, and on a GPU, by test_gpu_ssd.py.
"""

import pytest
import torch

from ssm_ops import causal_conv1d, ssd_chunk_scan
from ssm_ops._library import OPERATORS, resolve
from ssm_ops.causal_conv1d import api as conv_api
from ssm_ops.ssd import api as ssd_api
from tests.kernels.common import rms_error
from tests.kernels.ssd_common import TENSORS_OF_X, leaves, ssd_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

# (batch, length, heads, head_dim, state), options of the inputs, chunk: several tiles, of them broken, empty and parts
# of a chunk; several blocks of channels and states, the last one broken; a group of several heads
SSD = {
    "blocks": ((1, 40, 2, 70, 72), {"D": 2, "initial": True}, 32),
    "parts_of_chunks": ((1, 150, 2, 5, 3), {"groups": 2, "initial": True}, 130),
    "chunk_longer_than_the_map": ((2, 49, 3, 16, 16), {}, 256),
}

# (batch, channels, length, taps)
CONVOLUTIONS = {"tiles": (2, 11, 530, 4), "short": (3, 70, 9, 3), "more_taps_than_tokens": (1, 2, 3, 7)}


def on_device(inputs, dtype):
    """The inputs rounded to `dtype`, in float64."""
    return {n: None if t is None else t.to(DEVICE, dtype).double() for n, t in inputs.items()}


def run(function, inputs, factors, **options):
    """Results, and all gradients of their sum weighted with `factors`."""
    results = function(**inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [f.to(r.dtype) for f, r in zip(factors, results, strict=True)])
    named = dict(zip(("out", "final_states"), results, strict=False))
    return named | {f"d{n}": t.grad for n, t in inputs.items() if t is not None}


def assert_as_exact_as_the_reference(function, rounded, factors, dtype, of_x, **options):
    """Error at most twice that of the reference in the same dtype, both against float64 on the same numbers."""
    want = run(function, leaves(rounded, torch.float64, of_x), factors, impl="reference", **options)
    reference, got = (
        run(function, leaves(rounded, dtype, of_x), factors, impl=impl, **options) for impl in ("reference", "triton")
    )
    floors = dict.fromkeys(got, 1e-6)
    if "ddt_bias" in got:  # a sum over tokens that may cancel: its rounding is relative to the terms
        floors["ddt_bias"] *= float(want["ddt"].abs().sum((0, 1)).norm() / want["ddt_bias"].norm())
    for key, value in got.items():
        assert value.dtype == reference[key].dtype and value.shape == reference[key].shape, key
        assert rms_error(value, want[key]) <= 2 * rms_error(reference[key], want[key]) + floors[key], key


def check_ssd(case, dtype):
    sizes, options, chunk = case
    rounded = on_device(ssd_inputs(*sizes, **options), dtype)
    batch, _, heads, head_dim, n_state = sizes
    shapes = rounded["x"].shape, (batch, heads, head_dim, n_state)
    factors = [torch.randn(shape, device=DEVICE).to(dtype).double() for shape in shapes]
    flags = {"dt_softplus": True, "return_final_states": True, "chunk_size": chunk}
    assert_as_exact_as_the_reference(ssd_chunk_scan, rounded, factors, dtype, TENSORS_OF_X, **flags)


def channels_last(x):
    """(B, D, L) whose memory is (B, L, D)"""
    return x.mT.contiguous().mT


def check_convolution(sizes, dtype, reverse, last=False):
    batch, dim, length, taps = sizes
    made = {"x": torch.randn(batch, dim, length), "weight": torch.randn(dim, taps), "bias": torch.randn(dim)}
    if last:
        made["x"] = channels_last(made["x"])
    factors = [torch.randn(batch, dim, length, device=DEVICE).to(dtype).double()]
    flags = {"activation": "silu", "reverse": reverse}
    assert_as_exact_as_the_reference(causal_conv1d, on_device(made, dtype), factors, dtype, tuple(made), **flags)


@DTYPES
@pytest.mark.parametrize("case", SSD.values(), ids=SSD.keys())
def test_blocks_and_tiles_of_ssd(case, dtype):
    check_ssd(case, dtype)


@DTYPES
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_blocks_and_tiles_of_the_convolution(sizes, last, reverse, dtype):
    check_convolution(sizes, dtype, reverse, last)


@pytest.mark.parametrize("dout_last", [False, True])
def test_the_convolution_keeps_the_layout_of_its_input(dout_last):
    """Also of half of a wider tensor, as Vim's in_proj makes it, and whatever the layout of the gradient."""
    wide = channels_last(torch.randn(2, 2 * 20, 37, device=DEVICE))
    x, weight = wide[:, :20].detach().requires_grad_(), torch.randn(20, 4, device=DEVICE)
    dout = torch.randn(2, 20, 37, device=DEVICE)
    results = {}
    for impl in ("reference", "triton"):
        out = causal_conv1d(x, weight, activation="silu", impl=impl)
        [dx] = torch.autograd.grad(out, [x], channels_last(dout) if dout_last else dout)
        results[impl] = (out, dx)
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert got.mT.is_contiguous() and rms_error(got, want) < 1e-6


def test_slices_of_a_larger_tensor():
    """x, B and C as a model has them: parts of one projection, not aligned to 16 bytes."""
    inputs = leaves(on_device(ssd_inputs(2, 20, 2, 4, 3), torch.bfloat16), torch.bfloat16)
    whole = torch.randn(2, 20, 8 + 3 + 3 + 1, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    grads = {}
    for impl in ("reference", "triton"):
        x, B, C, _ = whole.split([8, 3, 3, 1], dim=2)
        inputs |= {"x": x.unflatten(2, (2, 4)), "B": B.unsqueeze(2), "C": C.unsqueeze(2)}
        out = ssd_chunk_scan(**inputs, dt_softplus=True, impl=impl)
        grads[impl] = [out, *torch.autograd.grad(out.float().square().sum(), [whole, inputs["dt"], inputs["A"]])]
    for got, want in zip(grads["triton"], grads["reference"], strict=True):
        assert rms_error(got, want) < 1e-2


def test_opcheck():
    made = leaves(on_device(ssd_inputs(1, 20, 2, 3, 4, D=2, initial=True), torch.float32), torch.float32)
    *args, initial = (t.detach() for t in made.values())
    # parts of chunks, so that what is saved is not what the kernels keep
    forward = (*args, initial, True, 70, torch.float32, "triton")
    torch.library.opcheck(ssd_api.ssd_chunk_scan_fwd, forward, test_utils=("test_schema", "test_faketensor"))
    out, final, states = ssd_api.ssd_chunk_scan_fwd(*forward)
    backward = (torch.randn_like(out), torch.randn_like(final), *args, initial, states, True, 70, "triton")
    torch.library.opcheck(ssd_api.ssd_chunk_scan_bwd, backward, test_utils=("test_schema", "test_faketensor"))
    contiguous, weight = torch.randn(2, 3, 9, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    for x in (contiguous, channels_last(contiguous)):
        torch.library.opcheck(conv_api.causal_conv1d_fwd, (x, weight, None, True, False, "triton"))
        backward = (torch.randn_like(x), x, weight, weight[:, 0].clone(), True, True, "triton")
        torch.library.opcheck(conv_api.causal_conv1d_bwd, backward)


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
@pytest.mark.parametrize("operator", ["ssd_chunk_scan", "causal_conv1d"])
def test_auto_never_takes_the_interpreter(operator):
    assert resolve(OPERATORS[operator], "auto", torch.device("cpu"), torch.float32) != "triton"
