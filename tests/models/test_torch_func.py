"""`torch.func`, forward mode and batched gradients over whole models, in the layouts of all families."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint

from tests.models.test_timm_contract import small

FAMILIES = {
    "vmamba_nano": {},  # computes in NCHW
    "vanilla_vmamba_tiny": {},  # in NHWC
    "vmamba_tiny_m2": {},
    "vssd_nano": {},
    "vssd_nano_iccv2025": {},
    "vim_nano": {"img_size": 32},
}
EVERY = pytest.mark.parametrize("name", FAMILIES)
NANO = pytest.mark.parametrize("name", ["vmamba_nano", "vssd_nano", "vim_nano"])
X, LABELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])


def model_of(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(2)
    return small(name, drop_path_rate=0.0, **FAMILIES[name], **options).eval()


def parts(model):
    """Parameters and buffers, as `functional_call` takes them."""
    return {n: p.detach() for n, p in model.named_parameters()}, dict(model.named_buffers())


def same(got, want, rtol=2e-4):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=rtol * float(w.abs().max()) + 1e-7)


def losses(model):
    params, buffers = parts(model)

    def loss(params, x, label):
        return F.cross_entropy(functional_call(model, (params, buffers), (x[None],)), label[None])

    return params, loss


@EVERY
def test_gradients_per_sample(name):
    params, loss = losses(model_of(name))
    got = vmap(grad(loss), in_dims=(None, 0, 0))(params, X, LABELS)
    alone = [grad(loss)(params, x, label) for x, label in zip(X, LABELS, strict=True)]
    assert got.keys() == params.keys()
    same(got.values(), [torch.stack([a[n] for a in alone]) for n in got])


@EVERY
def test_an_ensemble(name):
    models = [model_of(name), model_of(name)]
    for p in models[1].parameters():
        p.data += 0.05 * torch.randn_like(p)
    shell = copy.deepcopy(models[0]).to("meta")
    got = vmap(lambda p, b: functional_call(shell, (p, b), (X,)))(*stack_module_state(models))
    same(got, [m(X).detach() for m in models], 1e-5)
    assert (got[0] - got[1]).abs().max() > 1e-3


@EVERY
def test_images_by_vmap(name):
    model = model_of(name)
    got = vmap(lambda x: model(x[None])[0])(X)
    same([got], [model(X)], 1e-5)


@pytest.mark.full
def test_compiled_vmap():
    model = model_of("vmamba_nano")
    torch._dynamo.reset()
    compiled = torch.compile(vmap(lambda x: model(x[None])[0]), backend="aot_eager", fullgraph=True)
    same([compiled(X)], [model(X)], 1e-5)


@EVERY
def test_forward_mode_is_reverse_mode(name):
    model, direction = model_of(name), torch.randn_like(X)
    params, buffers = parts(model)
    steps = {n: torch.randn_like(p) for n, p in params.items()}

    def of(params, x):
        return functional_call(model, (params, buffers), (x,)).sin().sum()

    back = vjp(of, params, X)[1](torch.ones(()))
    want = sum((g * steps[n]).sum() for n, g in back[0].items()) + (back[1] * direction).sum()
    torch.testing.assert_close(jvp(of, (params, X), (steps, direction))[1], want, rtol=1e-3, atol=1e-3)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(X, direction))).tangent
    same(
        [dual], [functional.jvp(model, X, direction)[1]] if "vssd" not in name else [jvp(model, (X,), (direction,))[1]]
    )


@pytest.mark.full
@NANO
def test_jacobians_and_hessians_along_a_line(name):
    model = model_of(name, dtype=torch.float64)
    x, direction = X.double(), torch.randn_like(X).double()

    def line(t):
        return model(x + t * direction)

    zero = torch.zeros((), dtype=torch.float64)
    slopes = jacfwd(line)(zero)
    same([jacrev(line)(zero)], [slopes], 1e-8)
    same([functional.jacobian(line, zero)], [slopes], 1e-8)
    same([(line(zero + 1e-6) - line(zero - 1e-6)) / 2e-6], [slopes], 1e-4)  # kinks of ReLU
    bend = hessian(lambda t: line(t).sin().sum())(zero)
    by_reverse = grad(grad(lambda t: line(t).sin().sum()))(zero)
    same([bend], [by_reverse], 1e-8)


@EVERY
def test_batched_gradients(name):
    model = model_of(name)
    params, y = list(model.parameters()), model(X).sum(0)
    got = torch.autograd.grad(y, params, torch.eye(5), is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(row, params, retain_graph=True) for row in y]
    same(got, [torch.stack(row) for row in zip(*rows, strict=True)])


@pytest.mark.full
@EVERY
def test_gradcheck_in_both_modes(name):
    model, direction = model_of(name).double(), torch.randn_like(X).double()
    assert torch.autograd.gradcheck(
        lambda t: model(X.double() + t * direction),
        torch.zeros((), dtype=torch.float64, requires_grad=True),
        eps=1e-7,
        atol=1e-4,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@EVERY
def test_checkpointing_blocks_and_models(name):
    """Blocks that recompute, under `torch.func`, which cannot, too; and the whole model in both of PyTorch's ways."""
    model = model_of(name)
    params, loss = losses(model)
    want = grad(loss)(params, X[0], LABELS[0])
    model.set_grad_checkpointing(True)
    same(grad(loss)(params, X[0], LABELS[0]).values(), want.values())
    found = []
    for reentrant in (True, False):
        model.zero_grad()
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    model.set_grad_checkpointing(False)
    model.zero_grad()
    model(X).square().sum().backward()
    for grads in found:
        same(grads, [p.grad for p in model.parameters()])


@NANO
def test_the_reference_is_differentiated_twice(name):
    """By autograd alone, attention included."""
    model, x = model_of(name, dtype=torch.float64, scan_impl="reference"), X.double().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.square().sum() / 2, x)
    step, tiny = slope.detach(), 1e-6
    there, back = (grad(lambda x: model(x).sin().sum())(X.double() + s * tiny * step) for s in (1, -1))
    same([(there - back) / (2 * tiny)], [bend], 1e-3)
