"""Numbers of the fused scan: every implementation against the composition of the other operators in float64."""

import pytest
import torch

from ssm_ops import ss2d_scan
from tests.kernels.common import implementations, rms_error

IMPL = pytest.mark.parametrize("impl", implementations("ss2d_scan"))
NAMES = ("x", "proj", "dt_weight", "A", "D", "dt_bias")

# (batch, channels, height, width, state, rank): whole and broken blocks of channels, one and many chunks, one line
CASES = {
    "vmamba_v2": (2, 32, 14, 14, 1, 6),
    "vmamba_v1": (1, 24, 7, 5, 16, 6),
    "odd": (2, 33, 9, 13, 3, 17),
    "one_row": (1, 16, 1, 6, 2, 5),
    "one_column": (2, 5, 70, 1, 2, 1),
    "one_pixel": (3, 20, 1, 1, 1, 2),
    "large_map": (1, 16, 56, 56, 1, 6),
    "wide_rank": (1, 18, 8, 8, 1, 48),
}


def inputs(batch, dim, height, width, n_state, rank):
    """Random inputs of the size that trained models show, in float64."""
    return {
        "x": torch.randn(batch, dim, height, width, dtype=torch.float64),
        "proj": torch.randn(batch, height, width, 4 * (rank + 2 * n_state), dtype=torch.float64),
        "dt_weight": torch.randn(4, dim, rank, dtype=torch.float64) / rank**0.5,
        "A": -torch.rand(4 * dim, n_state, dtype=torch.float64) - 0.1,
        "D": torch.randn(4 * dim, dtype=torch.float64),
        "dt_bias": torch.randn(4 * dim, dtype=torch.float64) - 2,
    }


def leaves(made, dtype):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    return {n: x.to(dtype if n in ("x", "proj") else parameter).clone().requires_grad_() for n, x in made.items()}


def run(given, dout, impl, **options):
    out = ss2d_scan(**given, impl=impl, **options)
    out.backward(dout.to(out.dtype))
    return {"out": out} | {f"d{n}": x.grad for n, x in given.items()}


@IMPL
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float32_against_the_composition(case, channels_last, impl):
    made = inputs(*case)
    dout = torch.randn_like(made["x"])
    want = run(leaves(made, torch.float64), dout, "reference")
    given = leaves(made, torch.float32)
    if channels_last:
        given["x"] = made["x"].float().contiguous(memory_format=torch.channels_last).requires_grad_()
        dout = dout.contiguous(memory_format=torch.channels_last)
    got = run(given, dout, impl)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert got["out"].is_contiguous(memory_format=layout)
    for key, value in got.items():
        assert value.dtype == torch.float32 and value.shape == want[key].shape
        assert rms_error(value, want[key]) < 2e-6, key


@IMPL
@pytest.mark.parametrize("scans", ["unidi", "bidi"])
def test_other_routes(scans, impl):
    made = inputs(2, 20, 6, 7, 2, 3)
    dout = torch.randn_like(made["x"])
    want = run(leaves(made, torch.float64), dout, "reference", scans=scans)
    for key, value in run(leaves(made, torch.float32), dout, impl, scans=scans).items():
        assert rms_error(value, want[key]) < 2e-6, key


@IMPL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, impl):
    """Error at most twice that of the composition in the same dtype, both against float64 on the same numbers."""
    rounded = {n: x.to(dtype).double() for n, x in inputs(2, 24, 10, 9, 2, 4).items()}
    dout = torch.randn_like(rounded["x"]).to(dtype).double()
    want = run(leaves(rounded, torch.float64), dout, "reference")
    reference = run(leaves(rounded, dtype), dout, "reference", out_dtype=torch.float32)
    got = run(leaves(rounded, dtype), dout, impl, out_dtype=torch.float32)
    for key, value in got.items():
        assert value.dtype == reference[key].dtype
        assert rms_error(value, want[key]) <= 2 * rms_error(reference[key], want[key]) + 2e-6, key
        if value.dtype == torch.float32 and impl != "triton":  # nothing was rounded on the way to it
            assert rms_error(value, want[key]) < 2e-6, key


@IMPL
def test_gaps_and_overlaps_in_memory(impl):
    made = inputs(2, 16, 6, 8, 1, 2)
    dout = torch.randn(1, 16, 1, 8).double().expand(2, 16, 6, 8)
    want = run(leaves(made, torch.float64), dout, "reference")
    given = leaves(made, torch.float32)
    wide = torch.zeros(2, 16, 6, 10)
    wide[..., :8] = made["x"]
    given["x"] = wide[..., :8].requires_grad_()
    got = run(given, dout, impl)
    assert got["out"].is_contiguous()
    for key in ("out", "dproj", "dA"):
        assert rms_error(got[key], want[key]) < 2e-6, key


@IMPL
def test_same_call_same_bits_on_any_number_of_threads(impl):
    made = inputs(1, 64, 12, 12, 2, 4)
    dout = torch.randn_like(made["x"])
    threads = torch.get_num_threads()
    first = run(leaves(made, torch.float32), dout, impl)
    try:
        torch.set_num_threads(1)
        second = run(leaves(made, torch.float32), dout, impl)
    finally:
        torch.set_num_threads(threads)
    fused = impl != "reference"  # the composition's matrix products may be cut differently
    for key in first if fused else ():
        assert torch.equal(first[key], second[key]), key
    again = run(leaves(made, torch.float32), dout, impl)
    assert all(torch.equal(first[key], again[key]) for key in first)


@IMPL
def test_empty_batch(impl):
    got = run(leaves(inputs(0, 16, 4, 4, 1, 2), torch.float32), torch.zeros(0, 16, 4, 4), impl)
    assert got["out"].shape == (0, 16, 4, 4) and torch.equal(got["dA"], torch.zeros(64, 1))


def test_composition_by_finite_differences():
    given = leaves(inputs(1, 2, 2, 3, 1, 1), torch.float64)

    def scan(*tensors):
        return ss2d_scan(*tensors)

    assert torch.autograd.gradcheck(scan, tuple(given.values()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must be (B, D, H, W)"),
        (
            {"proj": torch.zeros(2, 4, 5, 15)},
            "proj must be (2, 4, 5, 16) for x (2, 3, 4, 5), R 2, N 1",
        ),
        ({"proj": torch.zeros(2, 4, 5, 16).half()}, "proj must be torch.float32"),
        ({"A": torch.zeros(12, 300)}, "N from 1 to 256"),
        ({"dt_weight": torch.zeros(4, 3, 300)}, "1 <= R <= 256"),
        ({"D": torch.zeros(3)}, "D must be (12,)"),
        ({"scans": "zigzag"}, "scans='zigzag' is not one of cross2d, unidi, bidi"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {n: x.detach() for n, x in leaves(inputs(2, 3, 4, 5, 1, 2), torch.float32).items()}
    with pytest.raises((ValueError, TypeError)) as caught:
        ss2d_scan(**given | change)
    assert message in str(caught.value)
