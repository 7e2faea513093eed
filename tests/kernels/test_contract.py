"""What every public operator promises to PyTorch: opcheck, no graph breaks, no recompilation per size, export."""

import importlib.metadata
import importlib.util

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ssm_ops import _library, cross_merge, cross_scan, selective_scan
from ssm_ops._library import _triton_problem, resolve
from ssm_ops.cross_scan import api as cross_api
from ssm_ops.selective_scan import api as scan_api
from tests.kernels.common import scan_inputs, to_dtype

CPU_IMPL = resolve(scan_api.SELECTIVE_SCAN, "auto", torch.device("cpu"), torch.float32)


def detached(inputs):
    return {n: x if x is None else x.detach() for n, x in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"groups": 2, "z": True}, {"D": False, "bias": False}], ids=["all", "bare"])
def test_opcheck_selective_scan(options, dtype):
    i = detached(to_dtype(scan_inputs(2, 4, 300, 3, **options), dtype))
    args = (i["u"], i["delta"], i["A"], i["B"], i["C"], i["D"], i["z"], i["delta_bias"])
    for keep_states in (True, False):
        torch.library.opcheck(scan_api.selective_scan_fwd, (*args, True, torch.float32, keep_states, CPU_IMPL))
    out, _, states = scan_api.selective_scan_fwd(*args, True, torch.float32, True, CPU_IMPL)
    torch.library.opcheck(scan_api.selective_scan_bwd, (torch.randn_like(out), *args, states, True, CPU_IMPL))


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("out_first", [True, False])
@pytest.mark.parametrize("in_first", [True, False])
def test_opcheck_cross_scan_and_merge(in_first, out_first, one_by_one):
    flags = (in_first, out_first, one_by_one, "cross2d")
    four = (4,) if one_by_one else ()
    x = torch.randn((2, *four, 3, 4, 5) if in_first else (2, 4, 5, *four, 3))
    y = torch.randn((2, 4, 3, 4, 5) if out_first else (2, 4, 5, 4, 3))
    impl = resolve(cross_api.CROSS_SCAN, "auto", x.device, x.dtype)
    torch.library.opcheck(torch.ops.ssm_ops.cross_scan.default, (x, *flags, impl))
    torch.library.opcheck(torch.ops.ssm_ops.cross_merge.default, (y, *flags, impl))


def ss2d_like(x, weight, A, D, bias):
    """scan -> project -> selective scan -> merge, as a model does it."""
    routes = cross_scan(x)  # (B, 4, C, L)
    dt, B, C = (weight @ routes).split([x.shape[1], 2, 2], dim=2)
    y = selective_scan(routes.flatten(1, 2), dt.flatten(1, 2), A, B, C, D, bias, delta_softplus=True)
    return cross_merge(y.unflatten(1, (4, -1)).unflatten(3, x.shape[2:]))


def ss2d_arguments(batch, height, width, channels=3):
    made = (
        torch.randn(batch, channels, height, width),
        0.3 * torch.randn(4, channels + 4, channels),
        -torch.rand(4 * channels, 2),
        torch.randn(4 * channels),
        torch.randn(4 * channels),
    )
    return [x.requires_grad_() for x in made]


def test_compiles_without_graph_breaks_and_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ss2d_like, fullgraph=True, dynamic=True, backend=counter)
    for size in ((5, 6, 9), (3, 5, 7), (2, 20, 14), (7, 9, 8)):
        args = ss2d_arguments(*size)
        want = torch.autograd.grad(ss2d_like(*args).sin().sum(), args)
        got = torch.autograd.grad(compiled(*args).sin().sum(), args)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_operators_as_nodes(strict):
    class Module(torch.nn.Module):
        def forward(self, x, weight, A, D, bias):
            return ss2d_like(x, weight, A, D, bias)

    args = tuple(a.detach() for a in ss2d_arguments(2, 4, 6))
    exported = torch.export.export(Module(), args, strict=strict)
    names = {str(n.target) for module in exported.graph_module.modules() for n in module.graph.nodes}
    for op in ("cross_scan", "selective_scan_fwd", "cross_merge"):
        assert f"ssm_ops.{op}.default" in names
    torch.testing.assert_close(exported.module()(*args), ss2d_like(*args))


def test_reference_exports_without_custom_operators():
    class Module(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            x = cross_scan(x, impl="reference").flatten(1, 2)
            return selective_scan(x, dt, A, B, C, delta_softplus=True, impl="reference")

    args = (torch.randn(2, 3, 4, 5), torch.randn(2, 12, 20), -torch.rand(12, 2), *torch.randn(2, 2, 4, 2, 20))
    exported = torch.export.export(Module(), args)
    assert not [n for n in exported.graph.nodes if "ssm_ops" in str(n.target)]
    torch.testing.assert_close(exported.module()(*args), Module()(*args))


def test_autocast_changes_nothing_inside():
    inputs = to_dtype(scan_inputs(2, 4, 50, 3, z=True), torch.float32)
    for impl in ("auto", "reference"):
        plain = selective_scan(**inputs, delta_softplus=True, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = selective_scan(**inputs, delta_softplus=True, impl=impl)
        assert under.dtype == torch.float32 and torch.equal(plain, under)


def test_unavailable_implementation_raises_and_tells_the_way_out():
    inputs = to_dtype(scan_inputs(1, 2, 4, 1), torch.float32)
    with pytest.raises(
        RuntimeError, match="impl='cuda' is not available on cpu.*Available here: .*reference.*pip install"
    ):
        selective_scan(**inputs, impl="cuda")


def test_operators_give_shapes_on_meta_tensors():
    i = {n: x if x is None else x.float().to("meta") for n, x in detached(scan_inputs(2, 4, 10, 3)).items()}
    out, last = selective_scan(**i, return_last_state=True)
    assert (out.shape, last.shape, out.device.type) == ((2, 4, 10), (2, 4, 3), "meta")
    assert cross_scan(torch.empty(2, 3, 4, 5, device="meta")).shape == (2, 4, 3, 20)


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("3.2.0", "triton 3.2.0 is too old"),
        ("3.3.1", None),
        ("3.10.0", None),
        ("4.0.0", "triton 4.0.0 is newer than the kernels, which are for 3: pip install 'triton<4'"),
        (None, None),
    ],
)
def test_triton_of_another_generation_is_not_taken(monkeypatch, version, problem):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    found = _triton_problem()
    assert found is None if problem is None else found.startswith(problem)


def test_gpus_of_another_maker_are_refused_by_name(monkeypatch):
    """PyTorch calls AMD's devices cuda; kernels that count on warps of 32 threads would compute something else."""
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    reason = _triton_problem()
    assert reason.startswith("torch is built for ROCm 6.4.1: the kernels are for NVIDIA GPUs")
    monkeypatch.setattr(_library, "_MISSING", {"triton": reason, "cuda": "not built"})
    operator = _library.OPERATORS["selective_scan"]
    assert _library.preferred(operator, "cuda") == ["reference"]
    with pytest.raises(RuntimeError, match="impl='triton' is not available on cuda: torch is built for ROCm"):
        resolve(operator, "triton", torch.device("cuda"), torch.float32)
