"""Our CUDA kernels on the CPU, emulated (cuda_emulator): numbers, memory, races, for any order of the threads.

Every launch here also checks each load and store of the kernels; a fault is an error of the call. What they have not
written is NaN.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssm_ops import _native, _trust, selective_scan
from ssm_ops._interface import AGREED
from ssm_ops.selective_scan import api
from ssm_ops.selective_scan.impl import cuda
from tests.kernels import cuda_emulator
from tests.kernels.common import rms_error, scan_inputs, to_dtype
from tests.kernels.cuda_emulator import Emulator
from tests.kernels.test_selective_scan import CASES, oracle, run

pytestmark = pytest.mark.skipif(not cuda_emulator.WORKS_HERE, reason="needs g++ on Linux")

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"
UNITS = [f"cuda/{path.name}" for path in sorted((CSRC / "cuda").glob("*.cu"))]
PLANS = [(8, 1), (8, 4), (32, 1), (32, 4)]
"""(lanes of a channel, warps of a block)"""
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    if given := os.environ.get("EMULATED_LIBRARY"):
        return Path(given)
    return cuda_emulator.build_once(tmp_path_factory, "ssm_ops", CSRC, UNITS)


@contextlib.contextmanager
def emulated_gpu(path: Path):
    """`impl="cuda"` runs on CPU tensors, by the library at `path`. Yields the emulator; `plan` is what to launch with,
    and None what the library itself plans for a GPU of 2 multiprocessors."""
    gpu = Emulator(path)
    loaded, problem = _native.load(str(path), AGREED["cuda"])
    assert problem is None, problem
    gpu.plan, plan, arguments = None, cuda._plan, cuda.CudaScanArguments
    called = _native.call

    def known(of):
        def allow(x):
            if x is not None:
                gpu.allow(x)
            return of(x)

        return SimpleNamespace(of=allow)

    def call(*given):
        try:
            called(*given)
        except RuntimeError as error:
            raise RuntimeError(gpu.explain(str(error))) from None
        finally:
            gpu.forbid()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_native._LOADED, "cuda", (loaded, None))
        patch.setitem(_native.PROBLEMS, "cuda", None)
        patch.setattr(api, "resolve", lambda *_: "cuda")
        patch.setattr(cuda, "call", call)
        patch.setattr(cuda, "_multiprocessors", lambda _: 2)
        patch.setattr(cuda, "_plan", lambda *given: gpu.plan or plan(*given))
        patch.setattr(cuda, "CudaScanArguments", lambda *maps, device, **more: arguments(*maps, device=0, **more))
        for name in ("CudaMap", "CudaStateMap", "Buffer"):
            patch.setattr(cuda, name, known(getattr(cuda, name).of))
        patch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=None))
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_name", lambda _: "emulated")
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            yield gpu
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu(library):
    with emulated_gpu(library) as emulator:
        yield emulator


def made(sizes, options, dtype=torch.float32):
    """Inputs that `dtype` has, the gradient of the output, and the exact results."""
    inputs = scan_inputs(*sizes, **options)
    rounded = {n: x if x is None else x.to(dtype).double() for n, x in inputs.items()}
    dout = torch.randn(rounded["u"].shape).to(dtype).double()
    return rounded, dout, oracle(rounded, dout)


def check(got, want, dtype):
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    for key, value in got.items():
        limit = 2e-6 if value.dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert rms_error(value, want[key]) < limit, key


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_float32_against_the_loop(case, gpu):
    *sizes, options = CASES[case]
    rounded, dout, want = made(sizes, options)
    check(run(to_dtype(rounded, torch.float32), dout, "cuda"), want, torch.float32)


@HALF
@pytest.mark.parametrize("case", ["vmamba_v2", "vim", "grouped_delta"])
def test_half_precision_rounds_only_the_results(case, dtype, gpu):
    *sizes, options = CASES[case]
    rounded, dout, want = made(sizes, options, dtype)
    for out_dtype in (dtype, torch.float32):
        got = run(to_dtype(rounded, dtype), dout, "cuda", out_dtype=out_dtype)
        assert got["out"].dtype == out_dtype
        check(got, want, dtype)


def test_step_sizes_in_float32_beside_half_precision(gpu):
    rounded, dout, _ = made((2, 12, 50, 2), {"groups": 2, "delta_dim": 3, "z": True}, torch.bfloat16)
    rounded["delta"] = (rounded["delta"] * 1.001).float().double()  # numbers that half precision does not have
    given = to_dtype(rounded, torch.bfloat16) | {"delta": rounded["delta"].float().requires_grad_()}
    got = run(given, dout, "cuda", out_dtype=torch.float32)
    assert got["ddelta"].dtype == torch.float32 and got["du"].dtype == got["dB"].dtype == torch.bfloat16
    check(got, oracle(rounded, dout), torch.bfloat16)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("options", [{"D": False, "bias": False}, {"groups": 3, "z": True}], ids=["bare", "all"])
def test_every_plan(options, plan, gpu):
    """Channels that fill no warp, tokens that fill no tile, without the softplus."""
    rounded, dout, _ = made((2, 3 * 5, 300, 3), options)
    rounded["delta"] = rounded["delta"].abs()
    gpu.plan = plan
    check(
        run(to_dtype(rounded, torch.float32), dout, "cuda", softplus=False), oracle(rounded, dout, False), torch.float32
    )


def test_an_empty_batch(gpu):
    before = gpu.counts()
    given = to_dtype(scan_inputs(0, 4, 9, 2, z=True), torch.float32)
    out, last = selective_scan(**given, impl="cuda", return_last_state=True)
    out.sum().backward()
    assert out.shape == (0, 4, 9) and last.shape == (0, 4, 2)
    assert all(torch.equal(given[name].grad, torch.zeros_like(given[name])) for name in ("A", "D", "delta_bias"))
    assert gpu.counts() == before


def test_what_32_bits_do_not_hold_is_refused(gpu, monkeypatch):
    called = cuda.call

    def call(library, function, arguments):
        arguments.length = 1 << 30
        called(library, function, arguments)

    monkeypatch.setattr(cuda, "call", call)
    with pytest.raises(
        RuntimeError, match="selective_scan_forward_float32: 4 channels or 1073741824 tokens are too many"
    ):
        selective_scan(**to_dtype(scan_inputs(1, 4, 9, 2), torch.float32), impl="cuda")


def apart(x, before, behind):
    """x with so many NaN before and behind every row."""
    whole = torch.full((*x.shape[:-1], before + x.shape[-1] + behind), float("nan"), dtype=x.dtype)
    return whole[..., before : before + x.shape[-1]].copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gaps", [(1, 2), (2, 2), (4, 4), (8, 8)], ids=str)
def test_rows_apart_and_of_any_alignment(gaps, dtype, gpu):
    rounded, dout, want = made((2, 6, 72, 2), {"groups": 2, "z": True}, dtype)
    given = to_dtype(rounded, dtype)
    for name in ("u", "delta", "B", "C", "z"):
        given[name] = apart(given[name].detach(), *gaps).requires_grad_()
    dout = apart(dout.to(dtype), *gaps)
    out, last = selective_scan(**given, delta_softplus=True, return_last_state=True, impl="cuda")
    grads = torch.autograd.grad(out, list(given.values()), dout)
    got = {"out": out, "last_state": last} | {f"d{n}": g for n, g in zip(given, grads, strict=True)}
    check(got, want, dtype)


def test_any_strides(gpu):
    """Time is not last in memory; a map of one sample serves all."""
    rounded, _, _ = made((3, 6, 30, 2), {"z": True})
    rounded |= {name: rounded[name][:1].expand(3, -1, -1, -1) for name in ("B", "C")}
    dout = torch.randn(3, 30, 6).mT.double()
    want = oracle(rounded, dout)
    given = to_dtype(rounded, torch.float32)
    given |= {name: given[name].detach().mT.contiguous().mT.requires_grad_() for name in ("u", "delta", "z", "A")}
    given |= {name: rounded[name][:1].float().expand(3, -1, -1, -1).requires_grad_() for name in ("B", "C")}
    check(run(given, dout, "cuda"), want, torch.float32)


def test_nan_in_nan_out(gpu):
    given = to_dtype(scan_inputs(1, 20, 200, 2), torch.float32)
    with torch.no_grad():
        given["u"][0, 3, 150] = float("nan")
    out = selective_scan(**given, delta_softplus=True, impl="cuda")
    assert out[0, 3, 150:].isnan().all() and out.isnan().sum() == 50


# ---- without a backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", [(8, 2), (32, 2)], ids=str)
def test_inference_writes_no_states(plan, dtype, gpu, monkeypatch):
    """The kernel is given no memory for them, and writes fewer sectors; the numbers are those of training."""
    gpu.plan, called, states = plan, cuda.call, []

    def call(library, function, arguments):
        states.append((arguments.states.data, arguments.states.count))
        called(library, function, arguments)

    monkeypatch.setattr(cuda, "call", call)
    given = to_dtype(scan_inputs(2, 6, 300, 3, groups=2, z=True), dtype)
    seen = [gpu.counts()["global_sectors"]]
    want = selective_scan(**given, delta_softplus=True, impl="cuda", return_last_state=True)
    seen.append(gpu.counts()["global_sectors"])
    with torch.no_grad():
        got = selective_scan(**given, delta_softplus=True, impl="cuda", return_last_state=True)
    seen.append(gpu.counts()["global_sectors"])
    assert [count for _, count in states] == [6 * 2 * 6 * 3, 0] and states[1][0] is None
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    # 5 tiles of 64 tokens, each with the states of 3 channels side by side
    assert seen[1] - seen[0] > seen[2] - seen[1] + 5 * 2 * 2 * 3 - 1


def test_a_backward_without_states_is_refused(gpu, monkeypatch):
    given = {n: x if x is None else x.detach() for n, x in to_dtype(scan_inputs(1, 4, 70, 2), torch.float32).items()}
    args = [given[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out, _, states = api.selective_scan_fwd(*args, True, torch.float32, False, "cuda")
    message = r"the backward needs states \(3, 1, 1, 2, 4\), got \(0,\): call the forward with keep_states=True"
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        api.selective_scan_bwd(out, *args, states, True, "cuda")
    monkeypatch.setattr(cuda, "check_states", lambda *_: None)
    with pytest.raises(RuntimeError, match="selective_scan_backward_float32: states holds 0 numbers, not 24"):
        api.selective_scan_bwd(out, *args, states, True, "cuda")


# ---- orders, counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [(8, 2), (32, 2)], ids=str)
def test_the_same_bits_in_every_order_of_the_threads(plan, gpu):
    rounded, dout, _ = made((1, 18, 140, 9), {"groups": 2, "z": True})
    gpu.plan = plan
    first = None
    for order, seed in [("forward", 0), ("reverse", 0), *itertools.product(("random", "greedy"), range(3))]:
        gpu.order(order, seed)
        got = run(to_dtype(rounded, torch.float32), dout, "cuda")
        first = first or got
        assert all(torch.equal(first[key], got[key]) for key in first), (order, seed)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2.1), (torch.bfloat16, 1.1)], ids=str)
@pytest.mark.parametrize("plan", [(8, 4), (32, 4)], ids=str)
def test_sectors_that_are_read_and_written(plan, dtype, most, gpu):
    """A run of 8 tokens is one vector in half precision; in float32 two, which share their sectors. Shared memory has
    no bank conflicts."""
    gpu.plan = plan
    given = to_dtype(scan_inputs(1, 16, 512, 4), dtype)
    seen = [gpu.counts()]
    out = selective_scan(**given, delta_softplus=True, impl="cuda")
    seen.append(gpu.counts())
    out.sum().backward()
    seen.append(gpu.counts())
    forward, backward = ({n: b[n] - a[n] for n in a} for a, b in itertools.pairwise(seen))
    for found in (forward, backward):
        assert 1 <= found["global_sectors"] / found["least_global_sectors"] < most
        assert found["shared_wavefronts"] == found["least_shared_wavefronts"] >= found["shared_requests"] > 0


# ---- at length ------------------------------------------------------------------------------------------------------

STATES = (1, 2, 3, 16, 17, 64, 255, 256)
LENGTHS = (1, 9, 64, 65, 257)
PRESENT = list(itertools.product((True, False), repeat=3))  # D, bias, z
GROUPINGS = [(1, 5, 5), (2, 3, 6), (3, 5, 5), (2, 12, 6), (1, 18, 3)]  # groups, channels of each, channels of delta


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_state", STATES)
def test_error_at_most_twice_that_of_the_reference(n_state, dtype, gpu):
    """Both against float64 on the same numbers. Sizes and options take turns."""
    floor = 1e-6 if n_state < 255 else 2e-6  # a sum over the states is formed one by one
    lengths, groupings = (LENGTHS, GROUPINGS) if n_state < 64 else ((1, 72), GROUPINGS[:2])
    for i, (length, lanes) in enumerate(itertools.product(lengths, (8, 32))):
        turn = i + 3 * STATES.index(n_state) + dtype.itemsize
        (groups, per_group, delta_dim), (D, bias, z) = groupings[turn % len(groupings)], PRESENT[turn % 8]
        options = {"groups": groups, "delta_dim": delta_dim, "D": D, "bias": bias, "z": z}
        rounded, dout, want = made((1 + turn % 2, groups * per_group, length, n_state), options, dtype)
        floats = cuda.BACKWARD_ROWS * n_state * 32 // lanes + 2 * cuda.SUMS
        gpu.plan = lanes, next(w for w in (4, 2, 1) if 4 * w * floats <= cuda.SHARED_BYTES)
        gpu.order("random", turn)
        out_dtype = torch.float32 if turn % 3 == 0 else dtype
        reference = run(to_dtype(rounded, dtype), dout, "reference", out_dtype=out_dtype)
        got = run(to_dtype(rounded, dtype), dout, "cuda", out_dtype=out_dtype)
        for key, value in got.items():
            assert value.dtype == reference[key].dtype and value.shape == reference[key].shape
            limit = 2 * rms_error(reference[key], want[key]) + floor
            assert rms_error(value, want[key]) <= limit, (key, gpu.plan, length, options)


# ---- faults are found -----------------------------------------------------------------------------------------------

BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")
SCANS = ["selective_scan_forward", "selective_scan_backward"]
BARRIERS = [
    (name, i) for name in SCANS for i, _ in enumerate(BARRIER.findall((CSRC / "cuda" / f"{name}.cuh").read_text()))
]

# what is changed, and what the emulator says of it
FAULTS = {
    "one_slot_of_sums": (SCANS[1], ", slot ^= 1)", ")", "race in shared memory"),
    "no_first_state": (SCANS[0], "carry[n * CHANNELS] = 0.0f;", "", "results differ"),
    "no_room": (
        SCANS[0],
        "a, forward_floats(a.state, 32 / R));\n}",
        "a, 1);\n}",
        "outside of every allocation.* of shared memory",
    ),
    "channels_that_do_not_exist": (SCANS[1], "if (k.exists && k.run == 0)", "if (k.run == 0)", "race in global memory"),
    "tail": (
        "selective_scan",
        "j < tokens ? to_float(__ldg(from + j)) : 0.0f",
        "to_float(__ldg(from + j))",
        "outside of",
    ),
    "alignment": ("selective_scan", "tokens == K && bytes >= 16", "tokens == K", "no multiple of 16"),
    "some_lanes": (SCANS[0], "saves) *save = h;", "saves) *save = h, __syncwarp();", "wait for each other"),
    "a_lane_is_gone": (SCANS[0], "float h = enter", "if (k.run == 3) return; float h = enter", "which has ended"),
    "blocks_share_a_sum": (
        SCANS[1],
        "(int64_t(k.block) * a.batch + k.sample)",
        "int64_t(k.sample)",
        "race in global memory: .* another block",
    ),
}


@functools.cache
def hard_cases():
    """One state and more than a batch of them; a tail, and rows that are aligned to 8 tokens."""
    return [made(sizes, {"groups": 2, "z": True}) for sizes in [(1, 6, 133, 1), (2, 18, 145, 10), (1, 6, 152, 9)]]


def build_changed(folder: Path, file: str, change, *flags) -> Path:
    """The library for float32, with a change in the text of one file."""
    shutil.copytree(CSRC, folder / "csrc")
    path = folder / "csrc" / "cuda" / f"{file}.cuh"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    units = ["cuda/abi.cu", *(f"cuda/{name}_float32.cu" for name in SCANS)]
    return cuda_emulator.build(folder / "csrc", units, folder / "built", *flags)


def verdict(folder: Path, file: str, change) -> str:
    """What is said of the kernels with a change in one file: the error of the first call that has one."""
    library = build_changed(folder, file, change)
    with emulated_gpu(library) as gpu:
        for (rounded, dout, want), plan in itertools.product(hard_cases(), [(8, 2), (32, 2)]):
            gpu.plan = plan
            gpu.order("random", 1)
            try:
                got = run(to_dtype(rounded, torch.float32), dout, "cuda")
            except RuntimeError as error:
                return str(error)
            if not all(rms_error(got[key], want[key]) < 2e-6 for key in want):  # NaN is not
                return "results differ"
    return "nothing"


@pytest.mark.full
@pytest.mark.parametrize(("file", "which"), BARRIERS, ids=str)
def test_a_missing_barrier_is_a_race(file, which, tmp_path):
    def remove(text):
        found = list(BARRIER.finditer(text))[which]
        return text[: found.start()] + text[found.end() :]

    assert re.search(r"race in (shared|global) memory.* with no barrier between", verdict(tmp_path, file, remove))


@pytest.mark.full
@pytest.mark.parametrize(("file", "old", "new", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_found(file, old, new, said, tmp_path):
    assert re.search(said, verdict(tmp_path, file, lambda text: text.replace(old, new)))


def under_sanitizers(library: Path, chosen: str) -> subprocess.CompletedProcess:
    """Tests of this file in a process where AddressSanitizer gives every tensor its own memory, with zones around."""
    runtime = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    environment = {"EMULATED_LIBRARY": str(library), "LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", __file__, "-k", chosen]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.full
def test_sanitizers_find_nothing(tmp_path):
    library = cuda_emulator.build(CSRC, UNITS, tmp_path / "built", cuda_emulator.SANITIZERS)
    done = under_sanitizers(library, "loop or half or beside or every_plan or empty or apart or strides")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\b3\d passed", done.stdout), done.stdout[-300:]


@pytest.mark.full
def test_sanitizers_find_a_fault(tmp_path):
    file, old, new, _ = FAULTS["tail"]
    library = build_changed(tmp_path, file, lambda text: text.replace(old, new), cuda_emulator.SANITIZERS)
    done = under_sanitizers(library, "loop and L2049")
    said = "AddressSanitizer: heap-buffer-overflow"
    assert done.returncode != 0 and said in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_probe(library):
    """On a device that is there, and on one that is not."""
    with emulated_gpu(library):
        assert _trust.probe(0) is None
        with pytest.raises(RuntimeError, match="ssm_ops_probe: invalid device ordinal"):
            _native.call("cuda", "ssm_ops_probe", ctypes.c_int64(7))
