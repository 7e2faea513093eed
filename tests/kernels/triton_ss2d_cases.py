"""Tests of ss2d_scan's Triton kernels beyond those of every implementation.

Not collected by name. They run under Triton's interpreter, started by test_triton_routes.py, and on a GPU, by
test_gpu_ss2d.py.
"""

import pytest
import torch
import triton.language as tl

from ssm_ops import _triton_routes as routes
from ssm_ops import ss2d_scan
from ssm_ops._library import OPERATORS, resolve
from ssm_ops.ss2d_scan import api
from tests.kernels.common import rms_error
from tests.kernels.test_ss2d_scan import inputs, leaves, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (batch, channels, height, width, state, rank), dtype, options: a broken block of channels beside a whole one, several
# tiles, maps narrower and wider than a run, every dtype, out in another one
CASES = {
    "blocks_and_tiles": ((1, 40, 9, 8, 1, 6), torch.bfloat16, {}),
    "narrow_columns": ((2, 16, 33, 2, 1, 1), torch.float16, {}),
    "one_row": ((1, 5, 1, 67, 3, 2), torch.bfloat16, {"out_dtype": torch.float32}),
    "two_blocks_of_ranks": ((1, 16, 7, 5, 1, 24), torch.float16, {"out_dtype": torch.float32}),
    "unidi": ((1, 20, 7, 5, 2, 3), torch.bfloat16, {"scans": "unidi"}),
    "bidi": ((1, 20, 5, 13, 1, 3), torch.float32, {"scans": "bidi", "out_dtype": torch.bfloat16}),
}


def on_device(made):
    return {n: x.to(DEVICE) for n, x in made.items()}


def assert_as_exact_as_the_reference(sizes, dtype, **options):
    """Error at most twice that of the composition in the same dtype, both against float64 on the same numbers."""
    rounded = {n: x.to(dtype).double() for n, x in on_device(inputs(*sizes)).items()}
    dout = torch.randn_like(rounded["x"]).to(dtype).double()
    want = run(leaves(rounded, torch.float64), dout, "reference", **options | {"out_dtype": torch.float64})
    reference, got = (run(leaves(rounded, dtype), dout, impl, **options) for impl in ("reference", "triton"))
    for key, value in got.items():
        assert value.dtype == reference[key].dtype and value.shape == reference[key].shape
        assert rms_error(value, want[key]) <= 2 * rms_error(reference[key], want[key]) + 2e-6, key


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sizes_dtypes_and_routes(case):
    sizes, dtype, options = case
    assert_as_exact_as_the_reference(sizes, dtype, **options)


@pytest.mark.parametrize("many_programs, ways", [(1, 1), (2, 2)])
def test_routes_one_after_another(many_programs, ways, monkeypatch):
    """As they are walked for large batches: sums of routes go through memory."""
    monkeypatch.setattr(routes, "MANY_PROGRAMS", many_programs)
    x = torch.empty(1, 72, 20, device=DEVICE)
    assert routes.plan(x, 4, 3, 1, "forward")[0] == routes.plan(x, 4, 3, 1, "backward")[0] == ways
    assert_as_exact_as_the_reference((1, 20, 9, 8, 1, 3), torch.bfloat16)


@pytest.mark.parametrize("tokens", [3, 4])
def test_runs_as_on_a_gpu(tokens, monkeypatch):
    monkeypatch.setattr(routes, "TOKENS_OF_RUN", dict.fromkeys(routes.TOKENS_OF_RUN, tokens))
    assert_as_exact_as_the_reference((1, 18, 11, 6, 1, 3), torch.float32)


def test_offsets_of_large_maps(monkeypatch):
    plan = routes.plan

    def plan_large(*args, **options):
        ways, grid, constants = plan(*args, **options)
        return ways, grid, constants | {"OFFSET": tl.int64}

    large = torch.empty(1, 1700 * 1700, 768, device="meta")
    assert plan(large, 4, 48, 1, "forward")[2]["OFFSET"] == tl.int64
    monkeypatch.setattr(routes, "plan", plan_large)
    assert_as_exact_as_the_reference((2, 5, 4, 3, 1, 2), torch.float32)


def test_everything_is_written_and_nothing_else_is_read(monkeypatch):
    """Memory that is handed out is full of NaN, or of the largest integers."""
    made = on_device(inputs(1, 20, 9, 8, 2, 3))
    dout = torch.randn_like(made["x"])
    monkeypatch.setattr(routes, "MANY_PROGRAMS", 1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(9).isnan().all()
        got = run(leaves(made, torch.float32), dout, "triton")
    finally:
        torch.use_deterministic_algorithms(before)
    for key, value in got.items():
        assert not value.isnan().any(), key


def test_inference_keeps_no_states(monkeypatch):
    """Two take turns, over routes of three tiles; the bits are those of training."""
    monkeypatch.setattr(routes, "MANY_PROGRAMS", 1)
    given = leaves(on_device(inputs(1, 5, 9, 15, 1, 2)), torch.float32)
    want = ss2d_scan(**given, impl="triton")
    with torch.no_grad():
        assert torch.equal(ss2d_scan(**given, impl="triton"), want)
        args = [*given.values(), "cross2d", torch.float32]
        none = api.ss2d_scan_fwd(*args, False, "triton")[1]
        assert none.shape == (0,)
        with pytest.raises(ValueError, match=r"ss2d_scan: the backward needs states \(4, 1, 4, 1, 5\), got \(0,\)"):
            api.ss2d_scan_bwd(want, *given.values(), none, "cross2d", "triton")


def test_opcheck():
    given = [x.detach() for x in leaves(on_device(inputs(1, 5, 3, 4, 1, 2)), torch.float32).values()]
    given[0] = given[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(api.ss2d_scan_fwd, (*given, "cross2d", torch.bfloat16, False, "triton"))
    out, states = api.ss2d_scan_fwd(*given, "cross2d", torch.float32, True, "triton")
    torch.library.opcheck(api.ss2d_scan_bwd, (torch.randn_like(out), *given, states, "cross2d", "triton"))


def test_nan_stays_behind_its_pixel():
    """Of one route alone: with unidi, pixels before it and other channels know nothing of it."""
    given = leaves(on_device(inputs(1, 18, 4, 6, 1, 2)), torch.float32)
    with torch.no_grad():
        given["x"][0, 3, 2, 1] = float("nan")
    bad = ss2d_scan(**given, scans="unidi", impl="triton").isnan()[0].flatten(1)
    assert bad[3, 13:].all() and bad.sum() == 24 - 13


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_auto_never_takes_the_interpreter():
    assert resolve(OPERATORS["ss2d_scan"], "auto", torch.device("cpu"), torch.float32) != "triton"
