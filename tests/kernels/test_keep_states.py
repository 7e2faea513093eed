"""The states that a backward needs are made where one may follow, and only there, in all of PyTorch's ways to call."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ssm_ops import bidirectional_scan, selective_scan, ss2d_scan
from ssm_ops._library import OPERATORS, why_unavailable
from tests.kernels import test_bidirectional_scan, test_ss2d_scan
from tests.kernels.common import scan_inputs, to_dtype

BUILT = pytest.mark.skipif(bool(why := why_unavailable(OPERATORS["ss2d_scan"], "cpu", "cpu")), reason=str(why))
pytestmark = BUILT

# by operator: tensors that need a gradient, options
SCANS = {
    selective_scan: lambda: to_dtype(scan_inputs(1, 4, 70, 2), torch.float32),
    ss2d_scan: lambda: test_ss2d_scan.leaves(test_ss2d_scan.inputs(1, 5, 3, 4, 1, 2), torch.float32),
    bidirectional_scan: lambda: test_bidirectional_scan.leaves(test_bidirectional_scan.inputs(1, 9), torch.float32),
}
ALL = pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.__name__)


class Calls(TorchDispatchMode):
    """What the forwards were told, and whether they returned states."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **kwargs or {})
        if func._schema.name.startswith("ssm_ops::") and func._schema.name.endswith("_fwd"):
            assert results[-1].shape != (0,) if args[-2] else results[-1].shape == (0,)
            self.kept.append(args[-2])
        return results


def kept(call) -> list[bool]:
    """Of every forward in `call`."""
    with Calls() as calls:
        call()
    return calls.kept


@ALL
def test_states_are_kept_for_gradients_alone(scan):
    given = SCANS[scan]()
    want = scan(**given)
    constants = {n: x if x is None else x.detach() for n, x in given.items()}
    assert kept(lambda: scan(**given)) == [True]
    assert kept(lambda: scan(**constants)) == [False]  # though grad mode is on
    assert kept(lambda: scan(**constants | {"A": given["A"]})) == [True]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept(lambda: scan(**given)) == [True]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert kept(lambda: scan(**given)) == [False]
            assert torch.equal(scan(**given), want)


@ALL
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_them_where_it_computes_again(scan, reentrant):
    given = SCANS[scan]()
    names = [name for name, x in given.items() if x is not None]

    def run(*tensors):
        return scan(**dict(zip(names, tensors, strict=True)))

    tensors = [given[name] for name in names]
    want = torch.autograd.grad(run(*tensors).sin().sum(), tensors)
    with Calls() as calls:
        out = checkpoint(run, *tensors, use_reentrant=reentrant)
        assert calls.kept == [not reentrant]
        out.sin().sum().backward()
    assert calls.kept == [not reentrant, True]
    assert all(torch.equal(x.grad, w) for x, w in zip(tensors, want, strict=True))


def test_compiled_graphs_say_what_they_need():
    given = SCANS[selective_scan]()
    graphs = []

    def compiler(graph, _):
        graphs.extend(n.args[-2] for n in graph.graph.nodes if "selective_scan_fwd" in str(n.target))
        return graph.forward

    compiled = torch.compile(
        lambda: selective_scan(**given), fullgraph=True, backend=aot_autograd(fw_compiler=compiler)
    )
    want = torch.autograd.grad(selective_scan(**given).sum(), given["B"])
    assert torch.equal(torch.autograd.grad(compiled().sum(), given["B"])[0], want[0])
    with torch.no_grad():
        assert torch.equal(compiled(), selective_scan(**given))
    assert graphs == [True, False]


def test_an_exported_program_decides_when_it_runs():
    class Scan(torch.nn.Module):
        def forward(self, given):
            return selective_scan(**given)

    given = SCANS[selective_scan]()
    program = torch.export.export(Scan(), (given,)).module()
    with torch.no_grad():
        assert kept(lambda: program(given)) == [False]
    assert kept(lambda: program(given)) == [True]
    want = torch.autograd.grad(selective_scan(**given).sum(), given["B"])
    assert torch.equal(torch.autograd.grad(program(given).sum(), given["B"])[0], want[0])
