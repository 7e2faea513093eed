"""Tests of bidirectional_scan's Triton kernels, few and short; all implementations' are in test_bidirectional_scan.py.

Not collected by name. They run under Triton's interpreter, started by test_triton_routes.py, and on a GPU, by
test_gpu_bidirectional.py.
"""

import pytest
import torch
import triton.language as tl

from ssm_ops import _triton_routes as routes
from ssm_ops import bidirectional_scan
from ssm_ops._library import OPERATORS, resolve
from ssm_ops.bidirectional_scan import api
from tests.kernels.common import rms_error
from tests.kernels.test_bidirectional_scan import inputs, leaves, run, slice_of_wider, to_dtype, transposed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (batch, length, channels, state, rank), dtype, out_dtype: a broken block of channels beside a whole one, several
# tiles, lengths that fill none, one and more, every dtype, out in another one, two blocks of ranks
CASES = {
    "blocks_and_tiles": ((1, 130, 40, 1, 6), torch.bfloat16, None),
    "one_token": ((2, 1, 5, 3, 2), torch.float16, None),
    "seven": ((1, 7, 16, 2, 1), torch.float32, torch.bfloat16),
    "below_a_tile": ((1, 49, 20, 3, 3), torch.float16, torch.float32),
    "two_blocks_of_ranks": ((2, 63, 5, 1, 24), torch.bfloat16, torch.float32),
    "vim": ((1, 197, 18, 1, 12), torch.float16, None),
}


def on_device(made):
    return {n: x.to(DEVICE) for n, x in made.items()}


def assert_as_exact_as_the_reference(sizes, dtype, out_dtype=None):
    """Error at most twice that of the composition in the same dtype, both against float64 on the same numbers."""
    rounded = {n: x.to(dtype).double() for n, x in on_device(inputs(*sizes)).items()}
    dout = torch.randn_like(rounded["x_forward"]).to(dtype).double()
    want = run(bidirectional_scan, leaves(rounded, torch.float64), dout, impl="reference")
    reference, got = (
        run(bidirectional_scan, leaves(rounded, dtype), dout, out_dtype=out_dtype, impl=impl)
        for impl in ("reference", "triton")
    )
    for key, value in got.items():
        assert value.dtype == reference[key].dtype and value.shape == reference[key].shape, key
        assert rms_error(value, want[key]) <= 2 * rms_error(reference[key], want[key]) + 2e-6, key


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sizes_and_dtypes(case):
    assert_as_exact_as_the_reference(*case)


@pytest.mark.parametrize(("many_programs", "ways"), [(1, 1), (10**9, 2)])
def test_directions_by_one_program_and_by_two(many_programs, ways, monkeypatch):
    """As in large batches, where the sum of the first one goes through memory, and in small ones."""
    monkeypatch.setattr(routes, "MANY_PROGRAMS", many_programs)
    assert routes.plan(torch.empty(1, 70, 20, device=DEVICE), 2, 3, 1, "forward")[0] == ways
    assert_as_exact_as_the_reference((1, 70, 20, 1, 3), torch.bfloat16)


@pytest.mark.parametrize("tokens", [3, 4])
def test_runs_as_on_a_gpu(tokens, monkeypatch):
    monkeypatch.setattr(routes, "TOKENS_OF_RUN", dict.fromkeys(routes.TOKENS_OF_RUN, tokens))
    assert_as_exact_as_the_reference((1, 66, 18, 1, 3), torch.float32)


def test_offsets_of_long_sequences(monkeypatch):
    plan = routes.plan

    def plan_large(*args, **options):
        ways, grid, constants = plan(*args, **options)
        return ways, grid, constants | {"OFFSET": tl.int64}

    monkeypatch.setattr(routes, "plan", plan_large)
    assert_as_exact_as_the_reference((2, 9, 5, 1, 2), torch.float32)


def test_any_strides():
    made = to_dtype(on_device(inputs(1, 33, 20, 2, 3)), torch.float32)
    dout = torch.randn(1, 1, 20, device=DEVICE).expand(1, 33, 20)
    want = run(bidirectional_scan, leaves(made, torch.float32), dout, impl="triton")
    change = {3: slice_of_wider, 2: transposed, 1: slice_of_wider}
    given = {n: change[x.dim()](x).requires_grad_() for n, x in made.items()}
    given["x_backward"] = transposed(made["x_backward"]).requires_grad_()
    assert not any(x.is_contiguous() for x in given.values() if x.dim() > 1)
    for key, value in run(bidirectional_scan, given, dout, impl="triton").items():
        assert torch.equal(value, want[key]), key


def test_everything_is_written_and_nothing_else_is_read(monkeypatch):
    """Memory that is handed out is full of NaN; the same call gives the same bits."""
    made = on_device(inputs(1, 70, 20, 1, 3))
    dout = torch.randn_like(made["x_forward"])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(9).isnan().all()
        first, again = (
            run(bidirectional_scan, leaves(made, torch.float32), dout, impl="triton", out_dtype=torch.bfloat16)
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(before)
    for key, value in first.items():
        assert not value.isnan().any() and torch.equal(value, again[key]), key


def test_inference_keeps_no_states(monkeypatch):
    """Two take turns, over three tiles of both directions; the bits are those of training."""
    monkeypatch.setattr(routes, "MANY_PROGRAMS", 1)
    given = leaves(on_device(inputs(1, 130, 5, 2, 2)), torch.float32)
    want = bidirectional_scan(**given, impl="triton")
    with torch.no_grad():
        assert torch.equal(bidirectional_scan(**given, impl="triton"), want)
        args = [*given.values(), torch.float32]
        none = api.bidirectional_scan_fwd(*args, False, "triton")[1]
        assert none.shape == (0,)
        with pytest.raises(ValueError, match=r"bidirectional_scan: the backward needs states \(4, 1, 2, 2, 5\), got"):
            api.bidirectional_scan_bwd(want, *given.values(), none, "triton")


def test_opcheck():
    given = tuple(to_dtype(on_device(inputs(1, 9, 5, 1, 2)), torch.float32).values())
    torch.library.opcheck(api.bidirectional_scan_fwd, (*given, torch.bfloat16, False, "triton"))
    out, states = api.bidirectional_scan_fwd(*given, torch.float32, True, "triton")
    torch.library.opcheck(api.bidirectional_scan_bwd, (torch.randn_like(out), *given, states, "triton"))


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_auto_never_takes_the_interpreter():
    assert resolve(OPERATORS["bidirectional_scan"], "auto", torch.device("cpu"), torch.float32) != "triton"
