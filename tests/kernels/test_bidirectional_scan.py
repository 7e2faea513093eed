"""Both directions in one scan: against a loop, the composition in float64, and what it promises to PyTorch."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from ssm_ops import bidirectional_scan
from ssm_ops._library import OPERATORS, available, why_unavailable
from ssm_ops.bidirectional_scan import api
from tests.kernels.common import implementations, rms_error

IMPL = pytest.mark.parametrize("impl", implementations("bidirectional_scan"))
FUSED = pytest.mark.skipif(bool(why := why_unavailable(api.BIDIRECTIONAL_SCAN, "cpu", "cpu")), reason=str(why))
SEQUENCES = ("x_forward", "x_backward", "proj")
LENGTHS = (1, 7, 49, 63, 64, 65, 197)
CHANNELS = (5, 16, 24, 33, 48)
STATES, RANKS = (1, 3, 16), (1, 6, 17, 48)

# (batch, length, channels, state, rank): every length with every number of channels, states and ranks in turn; and
# more channels, where the backward adds the parts of proj's gradient
CASES = [
    (1 + (i + j) % 2, length, dim, STATES[(i + j) % 3], RANKS[(i + 2 * j) % 4])
    for i, length in enumerate(LENGTHS)
    for j, dim in enumerate(CHANNELS)
] + [(1, 65, 130, 2, 6)]


def loop(x_forward, x_backward, proj, dt_weight, A, D, dt_bias):
    """The definition, one token after the other, in place of reversed copies from the last one on."""
    dim, rank, n_state = x_forward.shape[2], dt_weight.shape[2], A.shape[1]
    parameters = zip(dt_weight, A.split(dim), D.split(dim), dt_bias.split(dim), strict=True)
    tokens = range(x_forward.shape[1])
    ys = [0] * len(tokens)
    for x, p, order in zip((x_forward, x_backward), proj.chunk(2, 2), (tokens, reversed(tokens)), strict=True):
        h, (weight, a, d, bias) = 0, next(parameters)
        for t in order:
            dt, B, C = p[:, t].split([rank, n_state, n_state], 1)
            delta = F.softplus(dt @ weight.mT + bias)  # (B, D)
            h = torch.exp(delta[..., None] * a) * h + (delta * x[:, t])[..., None] * B[:, None]  # (B, D, N)
            ys[t] = ys[t] + (h * C[:, None]).sum(2) + d * x[:, t]
    return torch.stack(ys, 1)


def inputs(batch=2, length=20, dim=5, n_state=2, rank=3):
    """Random inputs of the size that trained models show, in float64."""
    return {
        "x_forward": torch.randn(batch, length, dim, dtype=torch.float64),
        "x_backward": torch.randn(batch, length, dim, dtype=torch.float64),
        "proj": torch.randn(batch, length, 2 * (rank + 2 * n_state), dtype=torch.float64),
        "dt_weight": torch.randn(2, dim, rank, dtype=torch.float64) / rank**0.5,
        "A": -torch.rand(2 * dim, n_state, dtype=torch.float64) - 0.1,
        "D": torch.randn(2 * dim, dtype=torch.float64),
        "dt_bias": torch.randn(2 * dim, dtype=torch.float64) - 2,
    }


def to_dtype(made, dtype):
    """As the operator wants them for `dtype`."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    return {n: t.to(dtype if n in SEQUENCES else parameter) for n, t in made.items()}


def leaves(made, dtype):
    return {n: t.clone().requires_grad_() for n, t in to_dtype(made, dtype).items()}


def run(function, given, dout, **options):
    out = function(**given, **options)
    out.backward(dout.to(out.dtype))
    return {"out": out} | {f"d{n}": t.grad for n, t in given.items()}


def composition(given, dout, **options):
    return run(bidirectional_scan, given, dout, impl="reference", **options)


# ---- numbers --------------------------------------------------------------------------------------------------------


@IMPL
@pytest.mark.parametrize("length, dim, n_state, rank", [(1, 5, 1, 1), (7, 3, 2, 4), (66, 4, 3, 2)])
def test_against_the_loop(length, dim, n_state, rank, impl):
    made = inputs(2, length, dim, n_state, rank)
    dout = torch.randn_like(made["x_forward"])
    want = run(loop, leaves(made, torch.float64), dout)
    exact = impl == "reference"
    got = run(bidirectional_scan, leaves(made, torch.float64 if exact else torch.float32), dout, impl=impl)
    for key, value in got.items():
        assert rms_error(value, want[key]) < (1e-12 if exact else 1e-6), key


@IMPL
@pytest.mark.parametrize("case", CASES, ids=lambda case: "B{} L{} D{} N{} R{}".format(*case))
def test_float32_against_the_composition(case, impl):
    made = inputs(*case)
    dout = torch.randn_like(made["x_forward"])
    want = composition(leaves(made, torch.float64), dout)
    got = run(bidirectional_scan, leaves(made, torch.float32), dout, impl=impl)
    assert got["out"].is_contiguous()
    for key, value in got.items():
        assert value.dtype == torch.float32 and value.shape == want[key].shape, key
        assert rms_error(value, want[key]) < 1e-6, key


@IMPL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("case", [(2, 65, 24, 2, 4), (1, 63, 33, 16, 6)], ids=["small", "odd"])
def test_half_precision(case, out_dtype, dtype, impl):
    """Error at most twice that of the composition in the same dtype, both against float64 on the same numbers."""
    rounded = {n: t.to(dtype).double() for n, t in inputs(*case).items()}
    dout = torch.randn_like(rounded["x_forward"]).to(dtype).double()
    want = composition(leaves(rounded, torch.float64), dout)
    reference = composition(leaves(rounded, dtype), dout, out_dtype=out_dtype)
    got = run(bidirectional_scan, leaves(rounded, dtype), dout, out_dtype=out_dtype, impl=impl)
    assert got["out"].dtype == (out_dtype or dtype)
    for key, value in got.items():
        assert value.dtype == reference[key].dtype, key
        assert rms_error(value, want[key]) <= 2 * rms_error(reference[key], want[key]) + 2e-6, key
        if value.dtype == torch.float32:  # nothing was rounded on the way to it
            assert rms_error(value, want[key]) < 2e-6, key


@IMPL
def test_out_dtype_rounds_the_same_sum(impl):
    given = to_dtype(inputs(), torch.float32)
    single = bidirectional_scan(**given, impl=impl)
    for out_dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(bidirectional_scan(**given, out_dtype=out_dtype, impl=impl), single.to(out_dtype))


def slice_of_wider(t):
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def transposed(t):
    return t.mT.contiguous().mT


def every_second(t):
    return t.repeat_interleave(2, -1)[..., ::2]


@IMPL
@pytest.mark.parametrize("dim", [16, 33])
@pytest.mark.parametrize("sequence, parameter", [(slice_of_wider, transposed), (transposed, every_second)])
def test_any_strides(sequence, parameter, dim, impl):
    made = inputs(dim=dim, length=65)
    dout = torch.randn(2, 1, dim).expand(2, 65, dim)  # overlaps itself in memory
    want = composition(leaves(made, torch.float64), dout)
    given = {}
    for name, t in to_dtype(made, torch.float32).items():
        change = every_second if t.dim() == 1 else sequence if name in SEQUENCES else parameter
        given[name] = change(t).requires_grad_()
        assert not given[name].is_contiguous()
    got = run(bidirectional_scan, given, dout, impl=impl)
    assert got["out"].is_contiguous()
    for key, value in got.items():
        assert rms_error(value, want[key]) < 1e-6, key


@IMPL
def test_one_sequence_for_both_directions_gets_the_sum_of_both_gradients(impl):
    made = inputs()
    dout = torch.randn_like(made.pop("x_backward"))

    def both_ways(x_forward, **rest):
        return bidirectional_scan(x_forward, x_forward, **rest)

    def looped(x_forward, **rest):
        return loop(x_forward, x_forward, **rest)

    want = run(looped, leaves(made, torch.float64), dout)
    for key, value in run(both_ways, leaves(made, torch.float32), dout, impl=impl).items():
        assert rms_error(value, want[key]) < 1e-6, key


@IMPL
def test_directions_are_each_others_mirror_image(impl):
    """Reversed in time and with the directions exchanged, everything comes out reversed."""
    given = to_dtype(inputs(length=65, dim=16), torch.float32)
    mirrored = {n: given[n].unflatten(0, (2, -1)).flip(0).flatten(0, 1) for n in ("A", "D", "dt_bias")}
    mirrored |= {
        "x_forward": given["x_backward"].flip(1),
        "x_backward": given["x_forward"].flip(1),
        "proj": given["proj"].unflatten(2, (2, -1)).flip(1, 2).flatten(2),
        "dt_weight": given["dt_weight"].flip(0),
    }
    want = bidirectional_scan(**given, impl=impl)
    assert rms_error(bidirectional_scan(**mirrored, impl=impl).flip(1), want) < 1e-6


@IMPL
def test_empty_batch(impl):
    given = leaves(inputs(batch=0), torch.float32)
    got = run(bidirectional_scan, given, torch.zeros(0, 20, 5), impl=impl)
    assert got["out"].shape == (0, 20, 5)
    for name, t in given.items():
        assert torch.equal(got[f"d{name}"], torch.zeros_like(t)), name


@IMPL
def test_same_call_same_bits_on_any_number_of_threads(impl):
    made = inputs(1, 65, 130, 2, 4)  # several parts of the channels in both directions of time
    dout = torch.randn_like(made["x_forward"])

    def call():
        return run(bidirectional_scan, leaves(made, torch.float32), dout, impl=impl)

    threads = torch.get_num_threads()
    first, again = call(), call()
    try:
        on_threads = []
        for n in (1, 2):
            torch.set_num_threads(n)
            on_threads.append(call())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[key], again[key]) for key in first)
    fused = impl != "reference"  # the composition's matrix products may be cut differently
    for key in first if fused else ():
        assert torch.equal(on_threads[0][key], on_threads[1][key]), key


def test_composition_by_finite_differences():
    given = leaves(inputs(1, 3, 2, 2, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: bidirectional_scan(*tensors), tuple(given.values()))


# ---- what is not a number -------------------------------------------------------------------------------------------

TOKEN, ROW = 66, 2 * (2 + 2 * 1)  # in the second chunk of states; numbers per token of R 2, N 1: dt dt B C, twice


@IMPL
@pytest.mark.parametrize("name", ["x_forward", "x_backward"])
def test_nan_of_a_sequence_reaches_only_what_sees_it(name, impl):
    given = to_dtype(inputs(2, 70, 20, 1, 2), torch.float32)
    given[name][0, TOKEN, 3] = float("nan")
    want = torch.zeros(2, 70, 20, dtype=torch.bool)
    want[0, slice(TOKEN, None) if name == "x_forward" else slice(TOKEN + 1), 3] = True
    assert torch.equal(bidirectional_scan(**given, impl=impl).isnan(), want)


@IMPL
@pytest.mark.parametrize("number", range(ROW))
def test_nan_of_a_projection_reaches_all_channels_that_see_it(number, impl):
    given = to_dtype(inputs(2, 70, 20, 1, 2), torch.float32)
    given["proj"][1, TOKEN, number] = float("nan")
    want = torch.zeros(2, 70, 20, dtype=torch.bool)
    direction, kind = divmod(number, ROW // 2)
    seen = slice(TOKEN, None) if direction == 0 else slice(TOKEN + 1)
    want[1, TOKEN if kind == 3 else seen] = True  # C has no memory
    assert torch.equal(bidirectional_scan(**given, impl=impl).isnan(), want)


@IMPL
@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("name", ["dt_weight", "A", "D", "dt_bias"])
def test_nan_of_a_parameter_reaches_its_channel(name, direction, impl):
    given = to_dtype(inputs(2, 70, 20, 1, 2), torch.float32)
    given[name].view(2, 20, -1)[direction, 3, 0] = float("nan")
    out = bidirectional_scan(**given, impl=impl)
    assert out[..., 3].isnan().all() and not out[..., [0, 1, 2, *range(4, 20)]].isnan().any()


@IMPL
def test_nan_of_the_gradient_reaches_both_directions(impl):
    made = inputs(2, 70, 20, 1, 2)
    dout = torch.randn(2, 70, 20)
    dout[0, TOKEN, 3] = float("nan")
    got = run(bidirectional_scan, leaves(made, torch.float32), dout, impl=impl)
    for name, seen in (("dx_forward", slice(TOKEN + 1)), ("dx_backward", slice(TOKEN, None))):
        want = torch.zeros(2, 70, 20, dtype=torch.bool)
        want[0, seen, 3] = True
        assert torch.equal(got[name].isnan(), want), name
    for name in ("dA", "dD", "ddt_bias"):
        assert got[name].view(2, 20, -1).isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 3], [1, 3]], name


# ---- errors ---------------------------------------------------------------------------------------------------------

SHAPES = "for x_forward (2, 20, 5), R 3, N 2, got"
BAD = {
    "x_forward must be (B, L, D) with at least one token, got (2, 20)": (
        {"x_forward": torch.zeros(2, 20)},
        ValueError,
    ),
    "with at least one token, got (2, 0, 5)": ({"x_forward": torch.zeros(2, 0, 5)}, ValueError),
    "with at least one token, got (2, 20, 0)": ({"x_forward": torch.zeros(2, 20, 0)}, ValueError),
    "x_forward is torch.int32; use float32, float16": (
        {"x_forward": torch.zeros(2, 20, 5, dtype=torch.int32)},
        TypeError,
    ),
    f"x_backward must be (2, 20, 5) {SHAPES} (2, 19, 5)": ({"x_backward": torch.zeros(2, 19, 5)}, ValueError),
    "x_backward must be torch.float32 beside x_forward in torch.float32, got torch.float16": (
        {"x_backward": torch.zeros(2, 20, 5).half()},
        TypeError,
    ),
    f"proj must be (2, 20, 14) {SHAPES} (2, 20, 7)": ({"proj": torch.zeros(2, 20, 7)}, ValueError),
    "proj must be torch.float32": ({"proj": torch.zeros(2, 20, 14).bfloat16()}, TypeError),
    "A must be (2 * D, N) with N from 1 to 256, got (10, 300)": ({"A": torch.zeros(10, 300)}, ValueError),
    "N from 1 to 256, got (10, 0)": ({"A": torch.zeros(10, 0)}, ValueError),
    f"A must be (10, 2) {SHAPES} (5, 2)": ({"A": torch.zeros(5, 2)}, ValueError),
    "dt_weight must be (2, D, R), 1 <= R <= 256, got (2, 5, 300)": ({"dt_weight": torch.zeros(2, 5, 300)}, ValueError),
    "1 <= R <= 256, got (10, 3)": ({"dt_weight": torch.zeros(10, 3)}, ValueError),
    f"dt_weight must be (2, 5, 3) {SHAPES} (4, 5, 3)": ({"dt_weight": torch.zeros(4, 5, 3)}, ValueError),
    f"D must be (10,) {SHAPES} (5,)": ({"D": torch.zeros(5)}, ValueError),
    "D must be torch.float32 beside x_forward in torch.float32, got torch.float64": (
        {"D": torch.zeros(10).double()},
        TypeError,
    ),
    f"dt_bias must be (10,) {SHAPES} (2, 5)": ({"dt_bias": torch.zeros(2, 5)}, ValueError),
    "dt_bias is on meta, x_forward is on cpu": ({"dt_bias": torch.zeros(10, device="meta")}, ValueError),
    "impl='fast' is not one of auto, reference, cpu, triton, cuda": ({"impl": "fast"}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    change, kind = BAD[message]
    with pytest.raises(kind) as caught:
        bidirectional_scan(**to_dtype(inputs(), torch.float32) | change)
    assert message in str(caught.value)


@FUSED
def test_fused_has_no_float64_and_says_what_has():
    with pytest.raises(RuntimeError) as caught:
        bidirectional_scan(**inputs(), impl="cpu")
    assert "bidirectional_scan: impl='cpu' is not available on cpu: it computes in torch.float32" in str(caught.value)
    assert "Available here: reference." in str(caught.value)


@pytest.mark.parametrize(("impl", "operator"), [("triton", "bidirectional_scan"), ("cuda", "selective_scan")])
def test_scans_of_other_devices_tell_what_is_here(impl, operator):
    """The fused one, and that of a composition."""
    scan = OPERATORS[operator]
    why = why_unavailable(scan, impl, "cpu", torch.float32)
    if why is None:
        pytest.skip(f"{impl} runs here")
    with pytest.raises(RuntimeError) as caught:
        bidirectional_scan(**to_dtype(inputs(), torch.float32), impl=impl)
    assert f"{operator}: impl='{impl}' is not available on cpu: {why}" in str(caught.value)
    assert f"Available here: {', '.join(available(scan, 'cpu', torch.float32))}." in str(caught.value)


@pytest.mark.parametrize("default", ["reference", "cuda"])
def test_the_default_may_name_a_composition(default, monkeypatch):
    """SSM_OPS_IMPL names a scan, which "auto" hands on."""
    asked = []
    monkeypatch.setattr(api, "DEFAULT_IMPL", default)
    monkeypatch.setattr(api.reference, "composition", lambda *args: asked.append(args[-1]))
    bidirectional_scan(**to_dtype(inputs(), torch.float32))
    assert asked == ["auto"]


def test_auto_gives_shapes_on_other_devices_and_warns_of_nothing(monkeypatch):
    """By the composition where nothing else runs; on a GPU by the fused scan in Triton."""
    given = to_dtype(inputs(), torch.float32)
    out = bidirectional_scan(**{n: t.to("meta") for n, t in given.items()}, out_dtype=torch.float16)
    assert (out.shape, out.dtype, out.device.type) == ((2, 20, 5), torch.float16, "meta")
    if why := why_unavailable(api.BIDIRECTIONAL_SCAN, "triton", "cuda"):
        pytest.skip(why)
    monkeypatch.setattr(api.reference, "composition", None)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = bidirectional_scan(**{n: torch.empty(t.shape, device="cuda") for n, t in given.items()})
    assert (out.shape, out.dtype, out.device.type) == ((2, 20, 5), torch.float32, "cuda")


# ---- what it promises to PyTorch ------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length, dim", [(65, 5), (64, 16)])
def test_opcheck(length, dim, dtype):
    args = tuple(to_dtype(inputs(2, length, dim, 3, 2), dtype).values())
    torch.library.opcheck(api.bidirectional_scan_fwd, (*args, torch.float32, False, "cpu"))
    out, states = api.bidirectional_scan_fwd(*args, torch.float32, True, "cpu")
    assert states.shape == (-(-length // 64) + 1, 2, 2, 3, dim)
    assert not states[-1].any()  # written, though nothing reads it
    torch.library.opcheck(api.bidirectional_scan_bwd, (torch.randn_like(out), *args, states, "cpu"))


@FUSED
def test_compiles_without_graph_breaks_and_once_for_all_lengths():
    """The reference scan cuts time by a square root of the length, and so is a graph of its own for each."""

    def scan(*args):
        return bidirectional_scan(*args)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((4, 20), (3, 9), (6, 130)):  # first sizes all differ
        args = tuple(leaves(inputs(batch, length), torch.float32).values())
        want = torch.autograd.grad(scan(*args).sin().sum(), args)
        got = torch.autograd.grad(compiled(*args).sin().sum(), args)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


class Scan(torch.nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.impl = impl

    def forward(self, *args):
        return bidirectional_scan(*args, impl=self.impl)


def exported_operators(exported):
    return [str(n.target) for n in exported.graph.nodes if "ssm_ops" in str(n.target)]


@FUSED
@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_export_keeps_the_operator_for_all_lengths(impl):
    args = tuple(to_dtype(inputs(), torch.float32).values())
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    sizes = (*({0: batch, 1: length},) * 3, *(None,) * 4)
    exported = torch.export.export(Scan(impl), args, dynamic_shapes=(sizes,))
    assert exported_operators(exported) == ["ssm_ops.bidirectional_scan_fwd.default"]
    other = tuple(to_dtype(inputs(3, 70), torch.float32).values())
    torch.testing.assert_close(exported.module()(*other), Scan(impl)(*other))


def test_reference_exports_without_custom_operators():
    args = tuple(to_dtype(inputs(), torch.float32).values())
    exported = torch.export.export(Scan("reference"), args)
    assert exported_operators(exported) == []
    torch.testing.assert_close(exported.module()(*args), Scan("reference")(*args))


@IMPL
def test_autocast_changes_nothing_inside(impl):
    made = inputs(length=65, dim=16)
    dout = torch.randn_like(made["x_forward"])
    plain = run(bidirectional_scan, leaves(made, torch.float32), dout, impl=impl)
    given = leaves(made, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bidirectional_scan(**given, impl=impl)
    out.backward(dout.float())
    for key, value in ({"out": out} | {f"d{n}": t.grad for n, t in given.items()}).items():
        assert value.dtype == torch.float32 and torch.equal(value, plain[key]), key
