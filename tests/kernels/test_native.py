"""The compiled libraries: none that differs from the sources is used, and none reads what it did not expect."""

import ctypes
import importlib
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ssm_ops
from ssm_ops import _interface, _library, _native
from ssm_ops._interface import AGREED, Buffer, CrossArguments, Map, Rows, StateMap
from tests.kernels.common import scan_inputs, to_dtype

SSM_OPS = Path(ssm_ops.__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
BUILT = pytest.mark.skipif(_native.PROBLEMS["cpu"] is not None, reason=str(_native.PROBLEMS["cpu"]))


# ---- what a library says of itself -----------------------------------------------------------------------------------


def stub(folder: Path, said: dict[str, int] | None) -> str:
    """A library that says `said` of itself; None: it was built before libraries said anything."""
    entries = "".join(f'{{"{name}", {value}}}, ' for name, value in (said or {}).items())
    source = "struct Agreement { const char* name; long long value; };"
    source += f"static const struct Agreement all[] = {{ {entries}{{0, 0}} }};"
    source += "const struct Agreement* ssm_ops_abi(void) { return all; }" if said is not None else ""
    (folder / "stub.c").write_text(source)
    target = folder / "stub.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", target, folder / "stub.c"], check=True)
    return str(target)


STALE = {
    "older": (None, "older than ssm_ops_abi"),
    "silent": ({}, f"VERSION is None, these sources need {AGREED['cpu']['VERSION']}"),
    "version": (AGREED["cpu"] | {"VERSION": 0}, f"VERSION is 0, these sources need {AGREED['cpu']['VERSION']}"),
    "size": (AGREED["cpu"] | {"Map": 40}, f"Map is 40, these sources need {AGREED['cpu']['Map']}"),
    "constant": (AGREED["cpu"] | {"CHUNK": 32}, "CHUNK is 32, these sources need 64"),
    "newer": (AGREED["cpu"] | {"NewArguments": 8}, "NewArguments is 8, these sources need None"),
}


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize(("said", "problem"), STALE.values(), ids=STALE.keys())
def test_a_stale_library_is_refused_by_name(said, problem, tmp_path):
    path = stub(tmp_path, said)
    assert _native.load(path, AGREED["cpu"]) == (None, f"at {path} is stale ({problem})")


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_library_that_agrees_is_taken(name, tmp_path):
    loaded, problem = _native.load(stub(tmp_path, AGREED[name]), AGREED[name])
    assert problem is None and loaded.ssm_ops_abi


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(60)], ids=["empty", "text", "cut"])
def test_what_is_no_library_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(content)
    loaded, problem = _native.load(str(path), AGREED["cpu"])
    assert loaded is None and problem.startswith(f"at {path} cannot be loaded (") and "\n" not in problem


USE = """
import warnings
import torch, ssm_ops
from ssm_ops.__main__ import report
x, A = torch.ones(1, 2, 5), -torch.ones(2, 1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(ssm_ops.selective_scan(x, x, A, x[:, :1], x[:, :1])[0, 0, 1].item())
        ssm_ops.cross_scan(torch.ones(1, 1, 2, 2))
print([str(w.message) for w in caught])
try:
    ssm_ops.selective_scan(x, x, A, x[:, :1], x[:, :1], impl="cpu")
except RuntimeError as error:
    print(error)
print(report())
"""


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_auto_goes_round_a_stale_library_and_says_so(tmp_path):
    """As a user meets it: the package after an update, beside the library of before."""
    package = tmp_path / "ssm_ops"
    shutil.copytree(SSM_OPS, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    path = str(package / "_cpu.so")
    shutil.copy(stub(tmp_path, STALE["size"][0]), path)

    done = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr

    why = f"the cpu library at {path} is stale (Map is 40, these sources need {AGREED['cpu']['Map']})"
    why += ": SSM_OPS_BUILD=cpu pip install -e . --no-build-isolation"
    first, second, caught, error, *doctor = done.stdout.splitlines()
    assert first == second and float(first) == pytest.approx(1.0 + torch.tensor(-1.0).exp().item())
    slow = "ssm_ops: selective_scan runs its slow reference implementation on cpu tensors: "
    assert caught == str([f"{slow}{why}; see `python -m ssm_ops`"])
    assert error.startswith(f"selective_scan: impl='cpu' is not available on cpu: {why}. Available here: reference.")
    assert f"    cpu        no: {why}" in doctor and "  selective_scan: auto takes reference" in doctor


def test_a_call_of_a_library_that_is_not_there_says_so(monkeypatch):
    """An exported program names the implementation that it was exported with."""
    monkeypatch.setitem(_native.PROBLEMS, "cpu", "the cpu library is not built: do this")
    with pytest.raises(RuntimeError, match="^selective_scan_forward: the cpu library is not built: do this$"):
        _native.call("cpu", "selective_scan_forward", _interface.ScanArguments())


# ---- what a library is given -----------------------------------------------------------------------------------------


def changes(arguments):
    """Everything in arguments that says how much there is, of which type, as (what, change, undo)."""

    def change(what, owner, field, value):
        before = getattr(owner, field)
        return what, lambda: setattr(owner, field, value), lambda: setattr(owner, field, before)

    def of_array(what, array, i):
        before = array[i]
        return what, lambda: array.__setitem__(i, before + 1), lambda: array.__setitem__(i, before)

    for name, kind in arguments._fields_:
        value = getattr(arguments, name)
        parts = value if issubclass(kind, ctypes.Array) and kind._type_ is Buffer else [value]
        for part in (p for p in parts if isinstance(p, (Buffer, Map, StateMap, Rows)) and p.dtype):
            wrong = {0, *_interface.DTYPES.values(), 99} - {part.dtype}
            yield from (change(f"{name}.dtype={dtype}", part, "dtype", dtype) for dtype in sorted(wrong))
            if isinstance(part, Buffer):
                yield change(f"{name}.count", part, "count", part.count - 1)
            else:
                yield from (of_array(f"{name}.size", part.size, i) for i in range(len(part.size)))
        if kind is ctypes.c_int64 and not name.startswith(("map_", "route_", "routes_")):
            yield change(f"{name}+1", arguments, name, value + 1)
        if name in ("size", "routes_size"):
            yield from (of_array(name, value, i) for i in range(len(value)))
    if isinstance(arguments, CrossArguments):
        yield change("map_routes", arguments, "map_routes", 3)
        yield from (change(f"{name}=99", arguments, name, 99) for name in ("map_dtype", "routes_dtype"))
        yield from (change(f"{name} is int32", arguments, name, 5) for name in ("map_dtype", "routes_dtype"))
    yield change("threads=0", arguments, "threads", 0)


@pytest.fixture
def refusals(monkeypatch):
    """Before every call: it is tried with each of its arguments falsified, and has to be refused. Counts the trials."""
    tried = []

    def call(library, function, arguments):
        for what, do, undo in changes(arguments):
            if what in ("parts+1", "tiles+1") and function.endswith("forward"):  # says nothing of the size of a tensor
                continue
            free = function.startswith(("nc_ssd", "ss2d")) and re.fullmatch(r"(out|y|dy)\.dtype=[123]", what)
            if free:  # as the caller likes
                continue
            do()
            with pytest.raises(RuntimeError, match=f"^{function}: [^\n]+$"):
                _native.call(library, function, arguments)
                pytest.fail(f"{function} takes {what}")
            undo()
            tried.append((function, what))
        _native.call(library, function, arguments)

    for module in (
        "selective_scan.impl.cpu",
        "causal_conv1d.impl.cpu",
        "cross_scan.impl.cpu",
        "_image_scan",
        "nc_ssd.impl.cpu",
    ):
        monkeypatch.setattr(importlib.import_module(f"ssm_ops.{module}"), "call", call)
    return tried


def randn(*shape):
    return torch.randn(*shape, requires_grad=True)


@BUILT
def test_what_does_not_fit_is_refused_not_read(refusals):
    scan = to_dtype(scan_inputs(2, 6, 9, 2, groups=2, delta_dim=3, z=True), torch.float32)
    outs = [ssm_ops.selective_scan(**scan, delta_softplus=True, impl="cpu")]
    outs += [ssm_ops.causal_conv1d(randn(2, 5, 9), randn(5, 4), randn(5), impl="cpu")]
    outs += [ssm_ops.causal_conv1d(randn(2, 9, 5).mT, randn(5, 4), randn(5), impl="cpu")]
    outs += [ssm_ops.cross_scan(randn(2, 3, 4, 5), impl="cpu"), ssm_ops.cross_merge(randn(2, 4, 3, 4, 5), impl="cpu")]
    outs += [ssm_ops.cross_merge(randn(2, 4, 3, 4, 5), one_by_one=True, impl="cpu")]
    parameters = {"A": randn(64, 1), "D": randn(64), "dt_bias": randn(64)}
    outs += [ssm_ops.ss2d_scan(randn(2, 16, 3, 4), randn(2, 3, 4, 16), randn(4, 16, 2), **parameters, impl="cpu")]
    parameters = {"A": randn(10, 1), "D": randn(10), "dt_bias": randn(10)}
    sequences = (randn(2, 9, 5), randn(2, 9, 5), randn(2, 9, 8))
    outs += [ssm_ops.bidirectional_scan(*sequences, randn(2, 5, 2), **parameters, impl="cpu")]
    heads = (randn(2, 9, 4, 5), randn(2, 9, 4), randn(4), randn(2, 9, 2, 3), randn(2, 9, 2, 3))
    outs += [ssm_ops.nc_ssd(*heads, D=randn(4), dt_bias=randn(4), impl="cpu")]
    torch.stack([out.sum() for out in outs]).sum().backward()
    both = ("selective_scan", "causal_conv1d", "ss2d_scan", "nc_ssd")
    functions = {f"{f}_{d}" for f in both for d in ("forward", "backward")}
    assert {function for function, _ in refusals} == functions | {"cross_scan", "cross_merge", "cross_unscan"}
    assert len(refusals) > 500


@BUILT
@pytest.mark.parametrize("wrong", [lambda s: s.double(), lambda s: s.bfloat16(), lambda s: s[:-1], lambda s: s[0]])
def test_saved_states_that_do_not_fit_raise(wrong):
    i = {n: None if t is None else t.detach() for n, t in to_dtype(scan_inputs(1, 4, 70, 2), torch.float32).items()}
    args = [i[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out, _, states = torch.ops.ssm_ops.selective_scan_fwd(*args, True, torch.float32, True, "cpu")
    with pytest.raises(RuntimeError, match="^selective_scan_backward: states holds "):
        torch.ops.ssm_ops.selective_scan_bwd(out, *args, wrong(states), True, "cpu")


@BUILT
def test_parameters_of_any_strides():
    """A library that gets a pointer must not read past the gaps."""
    given = to_dtype(scan_inputs(1, 6, 9, 2), torch.float32)
    apart = {n: torch.stack([given[n], given[n]], -1)[..., 0] for n in ("A", "D", "delta_bias")}
    assert not any(t.is_contiguous() for t in apart.values())
    want, got = (ssm_ops.selective_scan(**given | more, impl="cpu") for more in ({}, apart))
    assert torch.equal(got, want)
    whole = torch.randn(2, 9, 7, dtype=torch.bfloat16)
    x, weight, bias = whole[..., :5].mT, torch.randn(4, 5).t(), torch.randn(10)[::2]
    got, want = (ssm_ops.causal_conv1d(x, weight, bias, impl=impl) for impl in ("cpu", "reference"))
    torch.testing.assert_close(got, want)


# ---- which implementation --------------------------------------------------------------------------------------------

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))


@pytest.fixture
def process(monkeypatch):
    """Sets what this process prefers and lacks; nothing has been warned of yet."""

    def set_up(prefers="auto", missing=()):
        monkeypatch.setattr(_library, "DEFAULT_IMPL", prefers)
        monkeypatch.setattr(_library, "_MISSING", {impl: f"no {impl}: build it" for impl in missing})
        monkeypatch.setattr(_library, "_WARNED", set())
        monkeypatch.setattr(_native, "PATHS", {"cpu": None, "cuda": None})

    return set_up


def resolved(operator, device=CPU, dtype=torch.float32, times=1):
    """What "auto" takes, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = {_library.resolve(_library.OPERATORS[operator], "auto", device, dtype) for _ in range(times)}
    (name,) = names
    return name, [str(w.message) for w in caught]


def test_a_preference_holds_for_those_that_have_it(process):
    process(prefers="cpu")
    assert resolved("selective_scan") == ("cpu", []) and resolved("ss2d_scan") == ("cpu", [])
    assert resolved("nc_ssd") == ("cpu", []) and resolved("ssd_chunk_scan") == ("reference", [])
    assert resolved("ssd_chunk_scan", CUDA) == ("triton", [])
    process(prefers="triton")
    assert resolved("selective_scan", CUDA) == ("triton", []) and resolved("nc_ssd", CUDA) == ("reference", [])
    assert resolved("bidirectional_scan") == ("cpu", []) and resolved("selective_scan") == ("cpu", [])
    process(prefers="reference", missing=("cpu", "cuda", "triton"))
    assert [resolved(name) for name in _library.OPERATORS] == [("reference", [])] * len(_library.OPERATORS)


def test_a_preference_that_is_not_ready_is_named_once(process):
    process(prefers="cuda", missing=("cuda",))
    name, said = resolved("selective_scan", CUDA, times=3)
    assert name == "triton"
    assert said == ["ssm_ops: selective_scan runs triton on cuda tensors: no cuda: build it; see `python -m ssm_ops`"]


@pytest.mark.parametrize("impl", ["cpu", "triton", "cuda"])
def test_an_argument_stays_strict(impl, process):
    process(prefers="reference", missing=("cpu", "cuda", "triton"))
    operator = _library.OPERATORS["selective_scan"]
    with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available on cuda: no {impl}: build it"):
        _library.resolve(operator, impl, CUDA, torch.float32)
    without = "ssd_chunk_scan" if impl == "cpu" else "nc_ssd"
    with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available on cpu: {without} has no {impl} impl"):
        _library.resolve(_library.OPERATORS[without], impl, CPU, torch.float32)


def test_a_missing_library_is_named_once_on_the_cpu(process):
    process(missing=("cpu", "cuda"))
    slow = "runs its slow reference implementation on cpu tensors: no cpu: build it; see `python -m ssm_ops`"
    assert resolved("selective_scan", times=3) == ("reference", [f"ssm_ops: selective_scan {slow}"])
    assert resolved("ss2d_scan") == ("reference", [])


@pytest.mark.parametrize(
    ("operator", "device", "dtype"),
    [
        ("nc_ssd", CUDA, torch.float32),
        ("nc_ssd", CPU, torch.float64),
        ("ssd_chunk_scan", CPU, torch.float32),
        ("bidirectional_scan", CUDA, torch.float64),
        ("selective_scan", CUDA, torch.float64),
        ("selective_scan", CPU, torch.float64),
        ("selective_scan", META, torch.float32),
    ],
    ids=str,
)
def test_no_warning_where_nothing_faster_exists(operator, device, dtype, process):
    process(missing=("cpu", "cuda", "triton"))
    assert resolved(operator, device, dtype) == ("reference", [])


def test_the_slow_reference_on_cuda_is_named_with_all_that_would_help(process):
    process(missing=("cpu", "cuda", "triton"))
    name, said = resolved("selective_scan", CUDA, times=2)
    assert name == "reference" and ["no cuda" in said[0], "no triton" in said[1], len(said)] == [True, True, 2]


# ---- numbers below the normal ones -----------------------------------------------------------------------------------


def test_faded_states_are_zero_in_a_call_alone():
    """An impulse at the first token, and exp(-20) of it left at every token."""
    length = 12
    x = torch.zeros(1, 16, length)
    x[..., 0] = 1.0
    ones = torch.ones(1, 1, length)
    y = ssm_ops.selective_scan(x, torch.ones_like(x), torch.full((16, 1), -20.0), ones, ones, impl="cpu")
    want = torch.exp(-20.0 * torch.arange(length, dtype=torch.float64))
    normal = want > torch.finfo(torch.float32).tiny
    assert 0 < normal.sum() < length - 2
    torch.testing.assert_close(y[0, :, normal].double(), want[normal].expand(16, -1), rtol=1e-5, atol=0)
    assert y[0, :, ~normal].abs().max() < torch.finfo(torch.float32).tiny
    small = torch.full((3,), 1e-40)
    assert torch.equal(small * 1, small) and small.max() > 0
