"""The Triton scans along routes, ss2d_scan and bidirectional_scan, without a GPU: their numbers under the interpreter,
whether they compile for GPUs."""

import importlib
import os

import pytest
import torch

triton = pytest.importorskip("triton")
from tests.kernels.common import passed_under_the_interpreter  # noqa: E402
from tests.kernels.gpu_compiler import compile_for_gpu, stack_bytes  # noqa: E402

ROUTES = importlib.import_module("ssm_ops._triton_routes")
SS2D = importlib.import_module("ssm_ops.ss2d_scan.impl.triton")
KERNELS = {"forward": ROUTES.route_scan_fwd_kernel, "backward": ROUTES.route_scan_bwd_kernel}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MAPS = {"x", "x_other", "proj", "dout", "out", "dx", "dx_other"}
FLOATS = {"dt_weight", "A", "D", "dt_bias", "sums", "states", "carried"}
FLOATS |= {"dproj", "ddt_weight", "dA", "dD", "dbias"}
ABSENT = {4: {"x_other", "dx_other"}, 2: {"pixels"}}
"""By the number of routes: ss2d_scan has one map and a table, bidirectional_scan two maps."""


ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_*.py run the same on the GPU")
# the larger maps in the other layout, half a minute for what smaller ones show
LARGER = "against_the_composition and (vmamba_v2 or odd) and True"


@ON_CPU
def test_kernels_under_the_interpreter():
    """Every path in the kernels, in a process where they run on the CPU."""
    files = ["triton_ss2d_cases.py", "triton_bidirectional_cases.py"]
    # the large map is 200 tiles, for minutes, of what a few show
    assert passed_under_the_interpreter(files, "triton and not large_map") >= 31


@ON_CPU
@pytest.mark.full
def test_operator_under_the_interpreter():
    """The tests of every implementation."""
    chosen = f"triton and not large_map and not ({LARGER})"
    assert passed_under_the_interpreter(["test_ss2d_scan.py"], chosen) >= 19


@ON_CPU
@pytest.mark.full
def test_larger_maps_under_the_interpreter():
    assert passed_under_the_interpreter(["test_ss2d_scan.py"], f"triton and ({LARGER})") == 2


UNLESS_HERE = "tell_what_is_here"
"""A test of what cannot run here, which skips where Triton can."""


@ON_CPU
@pytest.mark.full
@pytest.mark.parametrize(("chosen", "count"), [(f"not N16 and not {UNLESS_HERE}", 50), ("N16 and (L7 or L49)", 2)])
def test_both_directions_under_the_interpreter(chosen, count):
    """The tests of every implementation; 16 states of long sequences would take minutes."""
    assert passed_under_the_interpreter(["test_bidirectional_scan.py"], f"triton and {chosen}") >= count


# ---- compiled for a GPU, without one -------------------------------------------------------------------------------


def plan(batch, length, dim, direction, n_state, rank, dtype, routes=4):
    """The constants of a kernel as a GPU gets them."""

    class OnGpu:
        shape, is_cuda = (batch, length, dim), True

    OnGpu.dtype = dtype
    return ROUTES.plan(OnGpu, routes, rank, n_state, direction)[2]


# routes, dtype, state, rank, channels, capability
COMPILED = [
    (4, "bf16", 1, 6, 96, 90),
    (2, "bf16", 16, 12, 384, 90),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [
            (4, "fp32", 1, 6, 16, 80),
            (4, "fp16", 16, 48, 768, 90),
            (4, "bf16", 1, 6, 96, 80),
            (4, "bf16", 1, 6, 96, 100),
            (2, "fp16", 16, 12, 384, 80),
            (2, "bf16", 16, 12, 384, 100),
            (2, "fp32", 1, 24, 16, 90),
            (4, "bf16", 1, 24, 384, 90),
        ]
    ),
]


@pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled under TRITON_INTERPRET=1")
@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("routes, dtype, n_state, rank, dim, capability", COMPILED)
def test_kernels_compile(tmp_path, monkeypatch, direction, routes, dtype, n_state, rank, dim, capability):
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this triton has no compiler for NVIDIA GPUs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    constants = plan(128, 56 * 56, dim, direction, n_state, rank, torch_dtype, routes)
    pointers = dict.fromkeys(MAPS, dtype) | dict.fromkeys(FLOATS, "fp32") | {"pixels": "i32"}
    absent = ABSENT[routes] | ({"sums"} if (routes, direction) == (2, "backward") else set())
    pointers = {n: None if n in absent else t for n, t in pointers.items() if n in KERNELS[direction].arg_names}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
    cubin = compile_for_gpu(KERNELS[direction], pointers, constants, capability=capability, **options)
    if n_state == 1:
        assert stack_bytes(cubin, tmp_path) <= 64


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled under TRITON_INTERPRET=1")
def test_sizes_do_not_make_new_versions_of_a_kernel():
    """A new version is made by a dtype, by a constant, or by an integer that is specialised on: here by none."""
    for kernel, count in zip((*KERNELS.values(), SS2D.pixels_kernel), (6, 5, 5), strict=True):
        integers = [p for p in kernel.params if not p.is_constexpr and p.name not in MAPS | FLOATS | {"pixels"}]
        assert len(integers) == count and all(p.do_not_specialize for p in integers)
    for direction in KERNELS:
        made = {
            tuple(plan(b, h * w, dim, direction, 1, 12, torch.bfloat16).items())
            for b, dim in ((1, 96), (3, 200), (128, 768))
            for h in (1, 7, 56, 200)
            for w in (7, 14, 336)
        }
        assert len(made) == 1
