"""torch.set_default_dtype changes nothing: what compiled code gets, and what a model computes, says its own dtype."""

import ast
import contextlib
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import ssm_models  # noqa: F401  registers the models
import ssm_ops
from ssm_models.vssm import VSSM
from tests.kernels.common import implementations

SSM_OPS = Path(ssm_ops.__file__).parent
DEFAULTS = (torch.bfloat16, torch.float16, torch.float64)
FACTORIES = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"}
FACTORIES |= {"randint", "randn", "scalar_tensor", "tensor", "zeros"}
METHODS = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---- in the source ---------------------------------------------------------------------------------------------------


def unsaid(source: str) -> list[str]:
    """Allocations that leave their dtype (those of torch also their device) to a default. Empty ones hold nothing."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, said = node.func.attr, {keyword.arg for keyword in node.keywords}
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if (of_torch and name in FACTORIES and not {"dtype", "device"} <= said) or (
            name in METHODS and "dtype" not in said and ast.unparse(node.args[0]) != "0"
        ):
            found.append(ast.unparse(node))
    return found


def test_the_check_of_the_source_sees_allocations():
    bad = ["torch.empty(3)", "torch.zeros(2, dtype=torch.int32)", "x.new_zeros((2, 3))", "torch.tensor(1.0, device=d)"]
    good = ["torch.empty(3, dtype=t, device=d)", "x.new_zeros(2, dtype=t)", "x.new_empty(0)", "torch.empty_like(x)"]
    assert unsaid("\n".join(bad + good)) == bad


def test_every_allocation_for_compiled_code_says_its_dtype():
    sources = sorted(SSM_OPS.rglob("*.py"))
    assert len(sources) > 40
    assert {str(path.relative_to(SSM_OPS)): said for path in sources if (said := unsaid(path.read_text()))} == {}


# ---- operators -------------------------------------------------------------------------------------------------------


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float32)


def parameters(channels, n_state):
    """A, D and bias."""
    return {"A": -randn(channels, n_state).abs(), "D": randn(channels), "bias": randn(channels)}


def selective_scan():
    p = parameters(6, 2)
    given = {"u": randn(2, 6, 9), "delta": randn(2, 6, 9), "B": randn(2, 2, 2, 9), "C": randn(2, 2, 2, 9)}
    given |= {"z": randn(2, 6, 9), "A": p["A"], "D": p["D"], "delta_bias": p["bias"]}
    return lambda impl, **tensors: ssm_ops.selective_scan(**tensors, delta_softplus=True, impl=impl), given


def ss2d_scan():
    p = parameters(4 * 5, 1)
    given = {"x": randn(1, 5, 3, 4), "proj": randn(1, 3, 4, 4 * 4), "dt_weight": randn(4, 5, 2)}
    return ssm_ops.ss2d_scan, given | {"A": p["A"], "D": p["D"], "dt_bias": p["bias"]}


def bidirectional_scan():
    p = parameters(2 * 5, 2)
    given = {"x_forward": randn(2, 7, 5), "x_backward": randn(2, 7, 5), "proj": randn(2, 7, 2 * 7)}
    return ssm_ops.bidirectional_scan, given | {
        "dt_weight": randn(2, 5, 3),
        "A": p["A"],
        "D": p["D"],
        "dt_bias": p["bias"],
    }


def cross_scan():
    return ssm_ops.cross_scan, {"x": randn(2, 3, 4, 5)}


def cross_merge():
    return ssm_ops.cross_merge, {"y": randn(2, 4, 3, 4, 5)}


def causal_conv1d():
    given = {"x": randn(2, 5, 9), "weight": randn(5, 4), "bias": randn(5)}
    return lambda impl, **tensors: ssm_ops.causal_conv1d(**tensors, activation="silu", impl=impl), given


def ssd(groups_of):
    given = {"x": randn(1, 9, 2, 3), "dt": randn(1, 9, 2), "A": -randn(2).abs(), "D": randn(2), "dt_bias": randn(2)}
    given |= {"B": randn(1, 9, 1, 2), "C": randn(1, 9, 1, 2)}
    return lambda impl, **tensors: groups_of(**tensors, dt_softplus=True, impl=impl), given


def ssd_chunk_scan():
    return ssd(lambda **given: ssm_ops.ssd_chunk_scan(**given, chunk_size=4))


def nc_ssd():
    return ssd(ssm_ops.nc_ssd)


CASES = (selective_scan, ss2d_scan, bidirectional_scan, cross_scan, cross_merge, causal_conv1d, ssd_chunk_scan, nc_ssd)
RUNS = [
    pytest.param(case, *parameter.values, id=f"{case.__name__}-{parameter.values[0]}", marks=parameter.marks)
    for case in CASES
    for parameter in implementations(case.__name__)
]


@pytest.mark.parametrize(("case", "impl"), RUNS)
def test_operators_and_their_gradients(case, impl):
    operator, given = case()
    given = {name: tensor.requires_grad_() for name, tensor in given.items()}

    def run():
        out = operator(impl=impl, **given)
        return [out, *torch.autograd.grad(out.square().sum(), list(given.values()))]

    want = run()
    assert want[0].dtype == torch.float32
    for dtype in DEFAULTS:
        with default_dtype(dtype):
            got = run()
        for g, w in zip(got, want, strict=True):
            assert g.dtype == w.dtype and torch.equal(g, w), dtype


# ---- models ----------------------------------------------------------------------------------------------------------

NANOS = ("vmamba_nano", "vim_nano", "vssd_nano")


def small_vmamba(forward_type):
    return lambda: VSSM(depths=(1, 1), dims=16, num_classes=10, forward_type=forward_type)


MODELS = {name: lambda name=name: timm.create_model(name, num_classes=10) for name in NANOS}
MODELS |= {
    f"vmamba_{kind}": small_vmamba(kind) for kind in ("v0", "v05_noz", "v052dc", "v05_onsigmoid", "m0_noz", "xv1a_act")
}
MODELS["vim_rope_flip"] = lambda: timm.create_model(
    "vim_nano", num_classes=10, if_rope=True, flip_img_sequences_ratio=0.5
)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_models_in_float32(make):
    """Logits and all gradients of a training step, to the last bit, also of another size than the model's own."""
    model, images = make().train(), randn(2, 3, 40, 40)

    def run():
        torch.manual_seed(1)
        model.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, torch.tensor([1, 2])).backward()
        return {"": logits.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want = run()
    for dtype in DEFAULTS:
        with default_dtype(dtype):
            got = run()
        assert got.keys() == want.keys() and [name for name in got if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16-true", "16-true"])
@pytest.mark.parametrize("name", NANOS)
def test_two_steps_of_lightning_true_half_precision(name, dtype):
    """What Lightning does: build and run under the default dtype, convert module and batch to it."""
    with default_dtype(dtype):
        model = timm.create_model(name, num_classes=10)
    model = model.to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, targets, losses = randn(4, 3, 32, 32).to(dtype), torch.arange(4), []
    for _ in range(3):
        with default_dtype(dtype):
            loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    assert {p.dtype for p in model.parameters()} == {loss.dtype for loss in losses} == {dtype}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[2] < losses[0]
