"""The Triton kernels without a GPU: their numbers under the interpreter, and whether they compile for GPUs."""

import importlib
import itertools
import os

import pytest
import torch

from ssm_ops import selective_scan
from tests.kernels.common import passed_under_the_interpreter, scan_inputs, to_dtype
from tests.kernels.gpu_compiler import compile_for_gpu, stack_bytes

triton = pytest.importorskip("triton")
OPERATORS = ("selective_scan", "cross_scan", "ssd", "causal_conv1d")
SCAN, CROSS, SSD, CONV = (importlib.import_module(f"ssm_ops.{name}.impl.triton") for name in OPERATORS)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the same on the GPU")
CASES = ["triton_cases.py", "triton_ssd_cases.py"]
# these three are minutes of what L1024 and L2049 show
LONG = "L2047 or L2048 or L3136"


@ON_CPU
def test_kernels_under_the_interpreter():
    """Every kernel and every path in it, in a process where kernels run on the CPU."""
    assert passed_under_the_interpreter(CASES, "triton and not torch.float16") >= 85


@ON_CPU
@pytest.mark.full
def test_half_precision_under_the_interpreter():
    """As bfloat16, which takes the same paths."""
    assert passed_under_the_interpreter(CASES, "torch.float16") >= 15


@ON_CPU
@pytest.mark.full
def test_operators_under_the_interpreter():
    """The tests of every implementation."""
    names = ["test_cross_scan.py", "test_selective_scan.py", "test_ssd.py", "test_ssd_contract.py"]
    names += ["test_causal_conv1d.py", "test_default_dtype.py"]
    # the finite differences of the adjoint test are thousands of launches; triton_cases.py has the same equality, and
    # triton_ssd_cases.py what the other two have
    chosen = f"triton and not adjoint and not half_dt and not L196 and not ({LONG})"
    assert passed_under_the_interpreter(names, chosen) >= 180


@ON_CPU
@pytest.mark.full
def test_long_sequences_under_the_interpreter():
    assert passed_under_the_interpreter(["test_selective_scan.py"], f"triton and ({LONG})") == 3


# ---- compiled for a GPU, without one -------------------------------------------------------------------------------


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    if INTERPRETED:
        pytest.skip("kernels are not compiled under TRITON_INTERPRET=1")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this triton has no compiler for NVIDIA GPUs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


# A100, H100, B200
CAPABILITIES = [80, 90, pytest.param(100, marks=pytest.mark.full)]
# batch, channels, length, state, dtype: the shapes that matter, and the rest of the dtypes and alignments
SCANS = [
    (128, 768, 3136, 1, "bf16", False),
    (128, 768, 3136, 1, "fp32", False),
    (128, 768, 196, 16, "fp16", True),
    (1, 8, 49, 1, "bf16", True),
]


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.full), *CAPABILITIES[1:]])
@pytest.mark.parametrize("batch, dim, length, n_state, dtype, gate", SCANS)
def test_selective_scan_compiles(no_cache, batch, dim, length, n_state, dtype, gate, capability):
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    u = torch.empty(batch, dim, length, dtype=torch_dtype, device="meta")
    width = SCAN._vector_width([u])
    for kernel, max_warps in ((SCAN.selective_scan_fwd_kernel, 1), (SCAN.selective_scan_bwd_kernel, 4)):
        _, blocks = SCAN._plan(u, 4, n_state, width, max_warps)
        warps = blocks.pop("num_warps")
        maps = dict.fromkeys(("u", "delta", "B", "C", "out", "dout", "du", "ddelta"), dtype)
        gates = dict.fromkeys(("z", "dz"), dtype if gate else None)
        kept = dict.fromkeys(("A", "D", "delta_bias", "states", "last", "dA", "dB", "dC", "dD", "dbias"), "fp32")
        pointers = {n: t for n, t in (maps | gates | kept).items() if n in kernel.arg_names}
        constants = blocks | {"N": n_state, "SOFTPLUS": True, "STAGES": 2}
        cubin = compile_for_gpu(kernel, pointers, constants, warps, capability)
        if n_state == 1 and width > 1:
            assert stack_bytes(cubin, no_cache) <= 64


@pytest.mark.parametrize("capability", [80, *(pytest.param(n, marks=pytest.mark.full) for n in (90, 100))])
@pytest.mark.parametrize("kernel", [CROSS.cross_scan_kernel, CROSS.cross_merge_kernel], ids=["scan", "merge"])
@pytest.mark.parametrize("dtype, size, layouts", [("bf16", 56, "FF"), ("fp32", 56, "LF"), ("fp16", 7, "FL")])
def test_cross_scan_and_merge_compile(no_cache, kernel, dtype, size, layouts, capability):
    x_last, y_last = (layout == "L" for layout in layouts)
    columns, backwards = CROSS.route_bits("cross2d")
    block = CROSS._blocks(192, size, size, x_last, y_last)
    vectors = dict.fromkeys(("X_VEC", "Y_VEC", "C_VEC", "L_VEC"), 4 if size % 4 == 0 else 1)
    constants = dict(zip(("BC", "BH", "BW"), block, strict=True)) | vectors
    constants |= {"ONE_BY_ONE": False, "COLUMNS": columns, "BACKWARDS": backwards, "X_LAST": x_last, "Y_LAST": y_last}
    cubin = compile_for_gpu(kernel, {"x": dtype, "y": dtype}, constants, 4, capability)
    assert stack_bytes(cubin, no_cache) == 0


SSD_KERNELS = {
    "walk": (SSD.ssd_state_kernel, SSD.WALK | {"BT": SSD.OUT["BT"]}),
    "out": (SSD.ssd_out_kernel, SSD.OUT),
    "input_grad": (SSD.ssd_input_grad_kernel, SSD.INPUT_GRAD),
    "projection_grad": (SSD.ssd_projection_grad_kernel, SSD.PROJECTION_GRAD),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SSD_KERNELS)
def test_ssd_compiles(no_cache, name, dtype, capability):
    kernel, largest = SSD_KERNELS[name]
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    for head_dim, n_state, vector in ((64, 64, 4), (20, 1, 1)):  # as models have it; padded and not aligned
        x, B = (torch.empty(1, 1, 1, n, dtype=torch_dtype, device="meta") for n in (head_dim, n_state))
        _, constants = SSD._plan(x, B, largest)
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
        constants |= dict.fromkeys(("X_VEC", "BC_VEC", "V_VEC", "K_VEC"), vector) | {"REVERSE": False}
        constants |= dict.fromkeys(("EXACT", "EXACT_DY"), SSD._exact(x))
        constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
        maps = dict.fromkeys(("x", "v", "k", "B", "C", "out", "dout", "dx", "dB", "dC"), dtype)
        kept = dict.fromkeys(("steps", "A", "D", "start", "states", "d_states", "d_dt", "dA", "dD"), "fp32")
        pointers = {n: t for n, t in (maps | kept).items() if n in kernel.arg_names}
        cubin = compile_for_gpu(kernel, pointers, constants, **options, capability=capability)
        # the assembler for sm_80 moves one word out of the way for the odd sizes in one of the kernels
        assert stack_bytes(cubin, no_cache) <= (0 if n_state == 64 else 8)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_ssd_steps_and_convolution_compile(no_cache, dtype, capability):
    steps = {"dt": dtype, "A": "fp32", "dt_bias": "fp32", "steps": "fp32"}
    cubins = [compile_for_gpu(SSD.ssd_step_kernel, steps, {"SOFTPLUS": True, "BT": 64}, 1, capability)]
    kernels = (CONV.causal_conv1d_kernel, CONV.causal_conv1d_grad_kernel)
    for kernel, last in itertools.product(kernels, (False, True)):
        _, _, blocks = CONV._plan(torch.empty(1, 384, 197, device="meta"), last)
        warps = blocks.pop("num_warps")
        maps = dict.fromkeys(("x", "weight", "bias", "out", "dout"), dtype)
        kept = dict.fromkeys(("dy", "d_weight", "d_bias"), "fp32")
        pointers = {n: t for n, t in (maps | kept).items() if n in kernel.arg_names}
        constants = blocks | {"K": 4, "SILU": True, "REVERSE": True, "LAST": last}
        constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
        cubins.append(compile_for_gpu(kernel, pointers, constants, warps, capability))
    assert [stack_bytes(cubin, no_cache) for cubin in cubins] == [0] * 5


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled under TRITON_INTERPRET=1")
def test_sizes_do_not_make_new_versions_of_a_kernel():
    """A new version is made by a dtype, by a constant, or by an integer that is specialised on: here by none."""
    kernels = (SCAN.selective_scan_fwd_kernel, SCAN.selective_scan_bwd_kernel)
    tensors = {"u", "delta", "A", "B", "C", "D", "z", "delta_bias", "out", "last", "states", "dout"}
    tensors |= {"du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias"}
    integers = [p for kernel in kernels for p in kernel.params if not p.is_constexpr and p.name not in tensors]
    for kernel in (CROSS.cross_scan_kernel, CROSS.cross_merge_kernel):
        integers += [p for p in kernel.params if not p.is_constexpr and p.name not in ("x", "y")]
    kernels = [SSD.ssd_step_kernel, *(kernel for kernel, _ in SSD_KERNELS.values())]
    tensors = {
        "x",
        "v",
        "k",
        "dt",
        "A",
        "B",
        "C",
        "D",
        "dt_bias",
        "steps",
        "start",
        "states",
        "d_states",
        "out",
        "dout",
    }
    tensors |= {"dx", "d_dt", "dA", "dB", "dC", "dD", "weight", "bias", "dy", "d_weight", "d_bias"}
    for kernel in kernels:
        integers += [p for p in kernel.params if not p.is_constexpr and p.name not in tensors]
    for kernel in (CONV.causal_conv1d_kernel, CONV.causal_conv1d_grad_kernel):
        integers += [p for p in kernel.params if not p.is_constexpr and p.name not in tensors - {"D"}]
    assert len(integers) > 120 and all(p.do_not_specialize for p in integers)

    def plan(batch, height, width):
        u = torch.empty(batch, 384, height * width, dtype=torch.bfloat16, device="meta")
        return tuple(SCAN._plan(u, 4, 1, SCAN._vector_width([u]), max_warps=4)[1].items())

    assert len({plan(b, h, w) for b in (16, 100, 128) for h in (16, 40, 56, 200) for w in (16, 48, 72, 336)}) == 1
    assert len({plan(b, h, w) for b in (1, 2, 9, 128) for h in range(1, 70, 3) for w in range(1, 70, 3)}) <= 32


def test_float64_is_refused_by_name():
    inputs = to_dtype(scan_inputs(1, 2, 4, 1), torch.float64)
    with pytest.raises(RuntimeError, match="impl='triton' is not available.*not in torch.float64"):
        selective_scan(**inputs, impl="triton")
