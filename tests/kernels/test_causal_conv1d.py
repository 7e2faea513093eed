"""The causal convolution in both directions: against a loop, finite differences, and what it promises to PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from ssm_ops import causal_conv1d
from ssm_ops._library import resolve
from ssm_ops.causal_conv1d import api
from tests.kernels.common import implementations, rms_error

IMPL = pytest.mark.parametrize("impl", implementations("causal_conv1d"))
FLOAT64 = ("auto", "reference")
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
LENGTHS = (1, 2, 7, 49, 63, 64, 65, 196)


def loop_conv(x, weight, bias=None, activation=None, reverse=False):
    """The definition, one token after the other: each sees itself and the K - 1 tokens before (after) it."""
    length, taps = x.shape[2], weight.shape[1]
    ys = []
    for t in range(length):
        y = torch.zeros_like(x[:, :, 0]) if bias is None else bias.expand(x.shape[0], -1)
        for k in range(taps):
            seen = t + (taps - 1 - k) if reverse else t - (taps - 1 - k)
            if 0 <= seen < length:
                y = y + weight[:, k] * x[:, :, seen]
        ys.append(y)
    y = torch.stack(ys, 2)
    return F.silu(y) if activation == "silu" else y


def conv_inputs(batch=2, dim=5, length=20, taps=4, bias=True):
    made = {"x": (batch, dim, length), "weight": (dim, taps), "bias": (dim,) if bias else None}
    return {name: None if shape is None else torch.randn(shape, dtype=torch.float64) for name, shape in made.items()}


def leaves(inputs, dtype, parameter=None):
    parameter = parameter or dtype
    return {
        n: None if t is None else t.to(dtype if n == "x" else parameter).clone().requires_grad_()
        for n, t in inputs.items()
    }


def run(function, inputs, dout, **options):
    out = function(**inputs, **options)
    out.backward(dout.to(out.dtype))
    return {"out": out} | {f"d{n}": t.grad for n, t in inputs.items() if t is not None}


@IMPL
@REVERSE
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("length", LENGTHS)
def test_float32_against_the_loop(length, activation, reverse, impl):
    for taps, bias in ((4, True), (2, False), (1, True)):
        inputs = conv_inputs(length=length, taps=taps, bias=bias)
        dout, options = torch.randn_like(inputs["x"]), {"activation": activation, "reverse": reverse}
        want = run(loop_conv, leaves(inputs, torch.float64), dout, **options)
        got = run(causal_conv1d, leaves(inputs, torch.float32), dout, **options, impl=impl)
        for key, value in got.items():
            assert value.shape == want[key].shape and value.is_contiguous(), key
            # a tap that sees no token has a gradient of exactly zero
            assert rms_error(value, want[key]) < 1e-6 or torch.equal(value.double(), want[key]), key


@IMPL
@REVERSE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["half_weight", "float32_weight"])
def test_half_precision_rounds_only_the_results(wide, dtype, reverse, impl):
    parameter = torch.float32 if wide else dtype
    rounded = {n: t.to(dtype).double() for n, t in conv_inputs(length=196).items()}
    dout, options = torch.randn(2, 5, 196).to(dtype).double(), {"activation": "silu", "reverse": reverse}
    want = run(loop_conv, leaves(rounded, torch.float64), dout, **options)
    got = run(causal_conv1d, leaves(rounded, dtype, parameter), dout, **options, impl=impl)
    for key, value in got.items():
        assert value.dtype == (dtype if key in ("out", "dx") else parameter)
        assert rms_error(value, want[key]) < (1e-6 if value.dtype == torch.float32 else torch.finfo(dtype).eps / 2), key


@pytest.mark.parametrize("impl", FLOAT64)
@REVERSE
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_by_finite_differences(activation, reverse, impl):
    def convolve(*tensors):
        return causal_conv1d(*tensors, activation=activation, reverse=reverse, impl=impl)

    assert torch.autograd.gradcheck(convolve, tuple(leaves(conv_inputs(2, 3, 5, 3), torch.float64).values()))


@IMPL
def test_reverse_is_the_flipped_convolution(impl):
    x, weight, bias = conv_inputs().values()
    backwards = causal_conv1d(x.flip(2), weight, bias, activation="silu", impl="reference").flip(2)
    got = causal_conv1d(x.float(), weight.float(), bias.float(), activation="silu", reverse=True, impl=impl)
    assert rms_error(got, backwards) < 1e-6


@IMPL
def test_any_strides_and_same_bits(impl):
    inputs = conv_inputs(length=65)
    dout = torch.randn(2, 65, 5).mT
    strided = leaves(inputs, torch.float32)
    strided["x"] = inputs["x"].float().mT.contiguous().mT.requires_grad_()
    strided["weight"] = inputs["weight"].float().mT.contiguous().mT.requires_grad_()
    plain = run(causal_conv1d, leaves(inputs, torch.float32), dout.contiguous(), activation="silu", impl=impl)
    again = run(causal_conv1d, leaves(inputs, torch.float32), dout.contiguous(), activation="silu", impl=impl)
    got = run(causal_conv1d, strided, dout, activation="silu", impl=impl)
    for key, value in got.items():
        assert rms_error(value, plain[key]) < 1e-6, key
        assert torch.equal(plain[key], again[key]), key


def channels_last(x):
    """(B, D, L) whose memory is (B, L, D)"""
    return x.mT.contiguous().mT


def half_of_wider(x):
    """(B, D, L) whose memory is the first half of the channels of (B, L, 2D)"""
    return torch.cat([x, x], 1).mT.contiguous().mT[:, : x.shape[1]]


# windows and channels-last results are those of "cpu"; the interpreter of Triton takes half a minute for these sizes
NOT_TRITON = pytest.mark.parametrize("impl", [i for i in implementations("causal_conv1d") if i.values != ("triton",)])
LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last, "half_of_wider": half_of_wider}


def keeps_channels_last(impl, dtype=torch.float32):
    return impl != "reference" and resolve(api.CAUSAL_CONV1D, impl, torch.device("cpu"), dtype) == "cpu"


def convolve_by_torch(x, weight, bias, reverse=False):
    """The definition by PyTorch's convolution: F.conv1d is a correlation, the padding makes it causal."""
    reach, dim = weight.shape[1] - 1, x.shape[1]
    padded, taps = F.pad(x, (0, reach) if reverse else (reach, 0)), weight.flip(1) if reverse else weight
    return F.silu(F.conv1d(padded, taps[:, None], bias, groups=dim))


@NOT_TRITON
@REVERSE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [5, 16, 20])
@pytest.mark.parametrize("length", [1, 7, 255, 256, 257, 600])
def test_layouts_in_whole_and_broken_blocks_and_windows(length, dim, layout, reverse, impl):
    """Blocks have 16 channels at most, windows 256 tokens, and a channels-last result where the input is so."""
    inputs = conv_inputs(dim=dim, length=length)
    dout = torch.randn_like(inputs["x"])
    want = run(convolve_by_torch, leaves(inputs, torch.float64), dout, reverse=reverse)
    x = LAYOUTS[layout](inputs["x"].float()).requires_grad_()
    given = leaves(inputs, torch.float32) | {"x": x}
    last = layout != "contiguous" and keeps_channels_last(impl)
    for dout_layout in (torch.Tensor.contiguous, channels_last):
        out = causal_conv1d(**given, activation="silu", reverse=reverse, impl=impl)
        grads = torch.autograd.grad(out, given.values(), dout_layout(dout.float()))
        got = {"out": out} | {f"d{n}": g for n, g in zip(given, grads, strict=True)}
        for key, value in got.items():
            assert (value.mT if last and key in ("out", "dx") else value).is_contiguous(), key
            # sums of up to 1200 numbers; a tap that sees no token has a gradient of exactly zero
            assert rms_error(value, want[key]) < 2e-6 or torch.equal(value.double(), want[key]), key


@NOT_TRITON
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "half_of_wider"])
def test_channels_last_in_half_precision(layout, dtype, impl):
    inputs = {n: t.to(dtype).double() for n, t in conv_inputs(dim=20, length=257).items()}
    dout = torch.randn(2, 20, 257).to(dtype).double()
    want = run(convolve_by_torch, leaves(inputs, torch.float64), dout)
    given = leaves(inputs, dtype)
    given["x"] = LAYOUTS[layout](inputs["x"].to(dtype)).requires_grad_()
    out = causal_conv1d(**given, activation="silu", impl=impl)
    grads = torch.autograd.grad(out, given.values(), dout.to(dtype))
    for key, value in zip(want, (out, *grads), strict=True):
        last = key in ("out", "dx") and keeps_channels_last(impl, dtype)
        assert value.dtype == dtype and (value.mT if last else value).is_contiguous(), key
        assert rms_error(value, want[key]) < torch.finfo(dtype).eps / 2, key


@IMPL
def test_empty_batch(impl):
    got = run(causal_conv1d, leaves(conv_inputs(batch=0), torch.float32), torch.zeros(0, 5, 20), impl=impl)
    assert got["out"].shape == got["dx"].shape == (0, 5, 20)
    assert torch.equal(got["dweight"], torch.zeros(5, 4)) and torch.equal(got["dbias"], torch.zeros(5))


@IMPL
def test_nan_reaches_only_the_tokens_that_see_it(impl):
    inputs = {n: t.float() for n, t in conv_inputs().items()}
    inputs["x"][0, 0, 10] = float("nan")
    out = causal_conv1d(**inputs, impl=impl)
    assert out[0, 0].isnan().nonzero().flatten().tolist() == [10, 11, 12, 13] and not out[0, 1:].isnan().any()


BAD = {
    "x must be (B, D, L)": ({"x": torch.zeros(5, 20)}, ValueError),
    "with L > 0": ({"x": torch.zeros(2, 5, 0)}, ValueError),
    "float32, float16": ({"x": torch.zeros(2, 5, 20, dtype=torch.int32)}, TypeError),
    "weight must be (5, K)": ({"weight": torch.zeros(5, 1, 4)}, ValueError),
    "with K > 0": ({"weight": torch.zeros(5, 0)}, ValueError),
    "weight must be torch.float32 beside x in torch.float32": ({"weight": torch.zeros(5, 4).half()}, TypeError),
    "bias must be (5,)": ({"bias": torch.zeros(4)}, ValueError),
    "bias is on meta": ({"bias": torch.zeros(5, device="meta")}, ValueError),
    "activation='relu' is not one of None, 'silu'": ({"activation": "relu"}, ValueError),
    "impl='fast'": ({"impl": "fast"}, ValueError),
    "impl='cuda' is not available on cpu": ({"impl": "cuda"}, RuntimeError),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    change, kind = BAD[message]
    with pytest.raises(kind) as caught:
        causal_conv1d(**leaves(conv_inputs(), torch.float32) | change)
    assert message in str(caught.value)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype, bias):
    x, weight, bias = (None if t is None else t.to(dtype) for t in conv_inputs(bias=bias).values())
    x = LAYOUTS[layout](x)
    impl = resolve(api.CAUSAL_CONV1D, "auto", x.device, x.dtype)
    torch.library.opcheck(api.causal_conv1d_fwd, (x, weight, bias, True, False, impl))
    torch.library.opcheck(api.causal_conv1d_bwd, (torch.randn_like(x), x, weight, bias, True, True, impl))


def both_directions(x, weight, bias):
    return causal_conv1d(x, weight, bias, activation="silu") + causal_conv1d(x, weight, bias, reverse=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_graph_breaks_and_once_for_all_sizes(layout):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both_directions, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((7, 20), (3, 9), (2, 196)):  # first sizes all differ
        x, *parameters = leaves(conv_inputs(batch, length=length), torch.float32).values()
        args = (LAYOUTS[layout](x.detach()).requires_grad_(), *parameters)
        want = torch.autograd.grad(both_directions(*args).sin().sum(), args)
        got = torch.autograd.grad(compiled(*args).sin().sum(), args)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5, check_stride=True)
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", FLOAT64)
def test_export(impl):
    class Module(torch.nn.Module):
        def forward(self, x, weight, bias):
            return causal_conv1d(x, weight, bias, activation="silu", reverse=True, impl=impl)

    args = tuple(t.float() for t in conv_inputs().values())
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    exported = torch.export.export(Module(), args, dynamic_shapes=({0: batch, 2: length}, None, None))
    ours = [str(n.target) for n in exported.graph.nodes if "ssm_ops" in str(n.target)]
    assert ours == ([] if impl == "reference" else ["ssm_ops.causal_conv1d_fwd.default"])
    other = (torch.randn(3, 5, 9), *args[1:])
    torch.testing.assert_close(exported.module()(*other), Module()(*other))


@pytest.mark.parametrize("impl", FLOAT64)
def test_autocast_changes_nothing_inside(impl):
    inputs = leaves(conv_inputs(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = causal_conv1d(**inputs, impl=impl)
    assert under.dtype == torch.float32 and torch.equal(under, causal_conv1d(**inputs, impl=impl))
