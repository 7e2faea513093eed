"""Numbers of SSD, causal and not: against a loop and finite differences; errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_ops import nc_ssd, ssd_chunk_scan
from ssm_ops.nc_ssd.impl import reference as nc_ssd_reference
from tests.kernels.common import implementations, rms_error
from tests.kernels.ssd_common import BOTH, TENSORS_OF_X, leaves, loop_nc_ssd, loop_ssd, run, ssd_inputs

SSD = pytest.mark.parametrize("impl", implementations("ssd_chunk_scan"))
NC = pytest.mark.parametrize("impl", implementations("nc_ssd"))
FLOAT64 = ("auto", "reference")

# (batch, length, heads, head_dim, state), options of the inputs, chunk
CASES = {
    "one_token": ((2, 1, 2, 3, 2), {}, 64),
    "L7": ((2, 7, 4, 3, 5), {"groups": 2, "D": 2, "initial": True}, 4),
    "L49": ((1, 49, 4, 8, 16), {"groups": 4, "D": 2}, 64),
    "L63": ((2, 63, 3, 4, 3), {"D": 0, "bias": False, "initial": True}, 16),
    "L64": ((1, 64, 2, 4, 8), {}, 64),
    "L65": ((1, 65, 6, 5, 8), {"groups": 3, "initial": True}, 64),
    "L196": ((2, 196, 4, 16, 1), {"groups": 4, "D": 2}, 64),
    "chunk_of_one": ((1, 5, 2, 2, 2), {"initial": True}, 1),
    "N256": ((1, 9, 2, 2, 256), {}, 8),
}


@SSD
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ssd_float32_against_the_loop(case, impl):
    sizes, options, chunk = case
    inputs = ssd_inputs(*sizes, **options)
    for softplus in (True, False):
        if not softplus:
            inputs["dt"] = F.softplus(inputs["dt"])
        want = run(loop_ssd, leaves(inputs, torch.float64), dt_softplus=softplus)
        flags = {"dt_softplus": softplus, "chunk_size": chunk, "return_final_states": True, "impl": impl}
        got = run(ssd_chunk_scan, leaves(inputs, torch.float32), **flags)
        for key, value in got.items():
            assert value.shape == want[key].shape and value.is_contiguous(), key
            assert rms_error(value, want[key]) < 2e-6, key  # about 16 float32 roundings


@NC
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES.values() if "initial" not in case[1]])
def test_nc_ssd_float32_against_the_loop(case, positive, impl):
    sizes, options, _ = case
    for groups in {options.get("groups", 1), 2 if sizes[2] % 2 == 0 else 1}:
        inputs = ssd_inputs(*sizes, **options | {"groups": groups})
        flags = {"dt_softplus": True, "positive": positive}
        want = run(loop_nc_ssd, leaves(inputs, torch.float64), **flags)
        got = run(nc_ssd, leaves(inputs, torch.float32), **flags, impl=impl)
        for key, value in got.items():
            assert value.shape == want[key].shape and value.is_contiguous(), key
            assert rms_error(value, want[key]) < 2e-6, key


class Products(TorchDispatchMode):
    """Records the dtypes of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            self.dtypes.append({t.dtype for t in args})
        return func(*args, **(kwargs or {}))


@NC
def test_bfloat16_products(impl):
    """The error is that of rounded factors and does not grow with the length, as it would if sums were rounded, too:
    the sum of 4096 ones is 256 in bfloat16."""
    errors = []
    for length in (64, 4096):
        made = ssd_inputs(1, length, 4, 8, 16, bias=False)
        made |= {"x": made["x"] + 1, "B": made["B"] + 1, "dt": torch.rand(1, length, 4).double() / length}
        rounded = {n: None if t is None else t.bfloat16().double() for n, t in made.items()}
        want = run(nc_ssd, leaves(rounded, torch.float64))
        got = run(nc_ssd, leaves(rounded, torch.bfloat16, ("x", "B", "C")), bfloat16_products=True, impl=impl)
        errors.append({key: rms_error(value, want[key]) for key, value in got.items()})
    assert max(e for found in errors for e in found.values()) < 2 * torch.finfo(torch.bfloat16).eps, errors


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_multiplied_is_bfloat16_if_that_is_asked_for(asked):
    tensors = leaves(ssd_inputs(1, 20, 4, 8, 16), torch.bfloat16, ("x", "B", "C")).values()
    with torch.no_grad(), Products() as products:
        out, state = nc_ssd_reference.forward(*tensors, True, True, asked, torch.float32)
        nc_ssd_reference.backward(torch.ones_like(out), *tensors, state, True, True, asked)
    assert products.dtypes == [{torch.bfloat16 if asked else torch.float32}] * 6


@NC
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_bfloat16_products_are_of_bfloat16_inputs_alone(dtype, impl):
    if dtype == torch.float64 and impl not in FLOAT64:
        pytest.skip(f"{impl} has no float64")
    inputs = ssd_inputs(2, 9, 4, 3, 5)
    got, same = (run(nc_ssd, leaves(inputs, dtype), bfloat16_products=flag, impl=impl) for flag in (True, False))
    assert all(torch.equal(value, same[key]) for key, value in got.items())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", [TENSORS_OF_X, ("x", "B", "C")], ids=["half_dt", "float32_dt"])
def test_half_precision_rounds_only_the_results(of_x, dtype, function, impl):
    """From the same rounded inputs, a half-precision result differs from the exact one by its own rounding alone."""
    made = ssd_inputs(2, 70, 4, 6, 5, groups=2, D=2, initial=function is ssd_chunk_scan)
    rounded = {n: t.to(dtype).double() for n, t in made.items()}
    loop, results = (loop_nc_ssd, {}) if function is nc_ssd else (loop_ssd, {"return_final_states": True})
    want = run(loop, leaves(rounded, torch.float64), dt_softplus=True)
    for out_dtype in (dtype, torch.float32):
        flags = {"dt_softplus": True, "out_dtype": out_dtype, "impl": impl}
        got = run(function, leaves(rounded, dtype, of_x), **flags, **results)
        for key, value in got.items():
            assert value.dtype == (
                out_dtype if key == "out" else dtype if key in [f"d{n}" for n in of_x] else torch.float32
            ), key
            limit = 2e-6 if value.dtype == torch.float32 else torch.finfo(dtype).eps / 2
            assert rms_error(value, want[key]) < limit, key


@pytest.mark.parametrize("impl", FLOAT64)
@pytest.mark.parametrize("D", [0, 1, 2])
def test_gradients_by_finite_differences(D, impl):
    inputs = leaves(ssd_inputs(1, 5, 4, 2, 2, groups=2, D=D, bias=D != 0, initial=D == 2), torch.float64)
    named = {n: t for n, t in inputs.items() if t is not None}

    def check(function, names, **options):
        def positional(*tensors):
            return function(**dict(zip(names, tensors, strict=True)), dt_softplus=D != 1, impl=impl, **options)

        assert torch.autograd.gradcheck(positional, tuple(named[n] for n in names))

    check(ssd_chunk_scan, list(named), chunk_size=2, return_final_states=True)
    check(nc_ssd, [n for n in named if n != "initial_states"], positive=D != 1)


@pytest.mark.parametrize("impl", FLOAT64)
def test_the_chunk_changes_only_the_rounding(impl):
    inputs = leaves(ssd_inputs(1, 50, 2, 3, 4), torch.float64)
    got = [ssd_chunk_scan(**inputs, chunk_size=c, dt_softplus=True, impl=impl) for c in (1, 7, 16, 50, 64)]
    for other in got[1:]:
        torch.testing.assert_close(other, got[0], rtol=1e-12, atol=1e-12)


@SSD
def test_strong_decays_lose_no_digits(impl):
    """Steps from 0 to 40 in one chunk: a difference of running sums would leave an error of 1e-5."""
    inputs = ssd_inputs(1, 60, 3, 4, 3)
    inputs["dt"] = torch.where(torch.rand_like(inputs["dt"]) < 0.5, 40.0, -3.0)
    want = run(loop_ssd, leaves(inputs, torch.float64), dt_softplus=True)
    flags = {"dt_softplus": True, "return_final_states": True, "impl": impl}
    for key, value in run(ssd_chunk_scan, leaves(inputs, torch.float32), **flags).items():
        assert rms_error(value, want[key]) < 2e-6, key


@BOTH
def test_any_strides_and_same_bits(function, impl):
    inputs = ssd_inputs(2, 65, 4, 3, 5, groups=2, D=2)
    plain, again = (run(function, leaves(inputs, torch.float32), dt_softplus=True, impl=impl) for _ in range(2))
    strided = leaves(inputs, torch.float32)
    for name in ("x", "dt", "B", "C", "D"):
        strided[name] = inputs[name].float().mT.contiguous().mT.requires_grad_()
    got = run(function, strided, dt_softplus=True, impl=impl)
    for key, value in got.items():
        assert rms_error(value, plain[key]) < 1e-6, key
        assert torch.equal(plain[key], again[key]), key
    out = function(**leaves(inputs, torch.float32), impl=impl)
    out.sum().backward()  # an expanded cotangent


@BOTH
def test_empty_batch(function, impl):
    got = run(function, leaves(ssd_inputs(0, 9, 4, 3, 2), torch.float32), impl=impl)
    assert got["out"].shape == got["dx"].shape == (0, 9, 4, 3)
    assert torch.equal(got["dA"], torch.zeros(4)) and torch.equal(got["dD"], torch.zeros(4))


@BOTH
def test_nan_in_nan_out(function, impl):
    inputs = leaves(ssd_inputs(1, 20, 2, 3, 2), torch.float32)
    with torch.no_grad():
        inputs["x"][0, 5, 0, 0] = float("nan")
    out = function(**inputs, dt_softplus=True, impl=impl)
    assert out[0, 5:, 0, 0].isnan().all() and not out[0, :, 1].isnan().any()


def test_reference_memory_grows_with_the_inputs_alone():
    """No intermediate is larger than one chunk's products, than an input, or than the states between chunks."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
            return out

    length, heads, head_dim, n_state, chunk = 2048, 4, 4, 8, 32
    inputs = leaves(ssd_inputs(1, length, heads, head_dim, n_state), torch.float32)
    with Largest() as largest:
        ssd_chunk_scan(**inputs, chunk_size=chunk, dt_softplus=True, impl="reference").sum().backward()
    states = (length // chunk + 1) * heads * head_dim * n_state
    assert largest.numel <= max(heads * chunk * chunk, length * heads * head_dim, states)
    assert largest.numel < length * heads * chunk


BAD = {
    "x must be (B, L, H, P)": ({"x": torch.zeros(2, 9, 12)}, ValueError),
    "with L, H, P > 0": ({"x": torch.zeros(2, 0, 4, 3)}, ValueError),
    "float32, float16": ({"x": torch.zeros(2, 9, 4, 3, dtype=torch.int32)}, TypeError),
    "dt must be (2, 9, 4)": ({"dt": torch.zeros(2, 4, 9)}, ValueError),
    "dt must be torch.float32 beside x in torch.float32": ({"dt": torch.zeros(2, 9, 4).half()}, TypeError),
    "A must be (4,)": ({"A": torch.zeros(4, 2)}, ValueError),
    "A must be torch.float32": ({"A": torch.zeros(4, dtype=torch.float64)}, TypeError),
    "B must be (B, L, G, N)": ({"B": torch.zeros(2, 9, 2)}, ValueError),
    "B must be (2, 9, 1, 2)": ({"B": torch.zeros(2, 8, 1, 2)}, ValueError),
    "which does not divide the 4 heads": ({"B": torch.zeros(2, 9, 3, 2)}, ValueError),
    "the state size N is 0": ({"B": torch.zeros(2, 9, 1, 0)}, ValueError),
    "C must be (2, 9, 1, 2)": ({"C": torch.zeros(2, 9, 1, 3)}, ValueError),
    "C is on meta": ({"C": torch.zeros(2, 9, 1, 2, device="meta")}, ValueError),
    "D must be (4,) or (4, 3)": ({"D": torch.zeros(3)}, ValueError),
    "dt_bias must be (4,)": ({"dt_bias": torch.zeros(1)}, ValueError),
    "impl='fast'": ({"impl": "fast"}, ValueError),
    "impl='cuda' is not available on cpu": ({"impl": "cuda"}, RuntimeError),
}
BAD_SSD = {
    "initial_states must be (2, 4, 3, 2)": ({"initial_states": torch.zeros(2, 4, 2, 3)}, ValueError),
    "chunk_size is 0; legal: 1 or more": ({"chunk_size": 0}, ValueError),
    "chunk_size must be an int, got Tensor": ({"chunk_size": torch.zeros(4)}, TypeError),
    "legal: 1 to 256": ({"B": torch.zeros(2, 9, 1, 257), "C": torch.zeros(2, 9, 1, 257)}, ValueError),
}


@pytest.mark.parametrize(
    "function, message",
    [(f, m) for f in (ssd_chunk_scan, nc_ssd) for m in BAD] + [(ssd_chunk_scan, m) for m in BAD_SSD],
)
def test_errors_name_the_argument(function, message):
    change, kind = (BAD | BAD_SSD)[message]
    with pytest.raises(kind) as caught:
        function(**leaves(ssd_inputs(2, 9, 4, 3, 2), torch.float32) | change)
    assert message in str(caught.value)
