"""What SSD, causal and not, promises to PyTorch: opcheck, no graph breaks, no recompilation per size, export."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ssm_ops import nc_ssd, ssd_chunk_scan
from ssm_ops._library import resolve
from ssm_ops.nc_ssd import api as nc_api
from ssm_ops.ssd import api as ssd_api
from tests.kernels.ssd_common import BOTH, leaves, run, ssd_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("full", [True, False], ids=["all", "bare"])
def test_opcheck(full, dtype):
    options = {"D": 2, "initial": True} if full else {"D": 0, "bias": False}
    made = {
        n: None if t is None else t.detach() for n, t in leaves(ssd_inputs(2, 40, 4, 3, 5, 2, **options), dtype).items()
    }
    initial = made.pop("initial_states", None)
    args, device = tuple(made.values()), torch.device("cpu")
    impl = resolve(ssd_api.SSD_CHUNK_SCAN, "auto", device, dtype)
    forward = (*args, initial, True, 16, torch.float32, impl)
    torch.library.opcheck(ssd_api.ssd_chunk_scan_fwd, forward)
    out, final, states = ssd_api.ssd_chunk_scan_fwd(*forward)
    backward = (torch.randn_like(out), torch.randn_like(final), *args, initial, states, True, 16, impl)
    torch.library.opcheck(ssd_api.ssd_chunk_scan_bwd, backward)

    impl = resolve(nc_api.NC_SSD, "auto", device, dtype)
    forward = (*args, True, True, True, torch.float32, impl)
    torch.library.opcheck(nc_api.nc_ssd_fwd, forward)
    out, state = nc_api.nc_ssd_fwd(*forward)
    torch.library.opcheck(nc_api.nc_ssd_bwd, (torch.randn_like(out), *args, state, True, True, True, impl))


def both(x, dt, A, B, C, D, bias, impl="auto"):
    """A causal mixer over a non-causal one."""
    options = {"D": D, "dt_bias": bias, "dt_softplus": True, "impl": impl}
    y, final = ssd_chunk_scan(x, dt, A, B, C, 16, return_final_states=True, **options)
    return nc_ssd(y.sin(), dt, A, B, C, **options) + final.sum(-1)[:, None]


def test_compiles_without_graph_breaks_and_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((7, 20), (6, 9), (2, 65)):  # first sizes all differ
        args = tuple(leaves(ssd_inputs(batch, length, 4, 3, 5, groups=2), torch.float32).values())
        want = torch.autograd.grad(both(*args).sin().sum(), args)
        got = torch.autograd.grad(compiled(*args).sin().sum(), args)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", ("auto", "reference"))
def test_export(impl):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return both(*args, impl=impl)

    args = tuple(t.float() for t in ssd_inputs(2, 40, 4, 3, 5, groups=2).values())
    exported = torch.export.export(Module(), args)
    ours = [str(n.target) for n in exported.graph.nodes if "ssm_ops" in str(n.target)]
    nodes = ["ssm_ops.ssd_chunk_scan_fwd.default", "ssm_ops.nc_ssd_fwd.default"]
    assert ours == ([] if impl == "reference" else nodes)
    torch.testing.assert_close(exported.module()(*args), Module()(*args))


@BOTH
def test_autocast_changes_nothing_inside(function, impl):
    inputs = leaves(ssd_inputs(2, 20, 4, 3, 5), torch.float32)
    plain = run(function, leaves(inputs, torch.float32), impl=impl)

    def forward_under_autocast(**given):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(**given)

    under = run(forward_under_autocast, leaves(inputs, torch.float32), impl=impl)
    assert under["out"].dtype == torch.float32
    for key, value in under.items():
        assert torch.equal(value, plain[key]), key
    if impl != "reference":  # whose backward is PyTorch's own and belongs, as all such, outside of autocast
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = run(function, leaves(inputs, torch.float32), impl=impl)
        assert all(torch.equal(value, plain[key]) for key, value in under.items())
