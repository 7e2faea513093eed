"""Whatever is put around, or in the place of, a layer of a model takes part in it: adapters, quantised layers,
parametrisations, pruning, hooks; and a parameter that learns alone learns what it does among others."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ssm_models import for_inference, plain_layers
from ssm_models.layers import onednn
from ssm_models.layers.norm import RMSNorm
from tests.models.test_timm_contract import OPTIONS, small
from tests.models.test_torch_func import FAMILIES, X

MODELS = [
    *FAMILIES.items(),
    *((n, o) for n, o in OPTIONS if o.get("forward_type") == "xv2a" or o.get("bimamba_type") == "none"),
]
HOOKED = [
    *MODELS,
    *((name, options) for name, options in OPTIONS if name == "vim_nano" and (name, options) not in MODELS),
]
EVERY = pytest.mark.parametrize(("name", "options"), MODELS, ids=str)
NANO = pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
LAYERS = (nn.Linear, nn.Conv2d, nn.Conv1d)


def model_of(name: str, **options) -> nn.Module:
    torch.manual_seed(2)
    return small(name, **({"drop_path_rate": 0.0} | options)).eval()


def layers(model, kinds=LAYERS):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]


def replace(model, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def in_every_way(model, x=X):
    """Logits where derivatives are wanted, where none are, and of the copy for inference."""
    ways = [model(x).detach()]
    with torch.no_grad():
        ways.append(model(x))
        if onednn.problem(torch.float32) is None:
            ways.append(for_inference(model)(x))
    return ways


def check(model, want, moved_from, x=X):
    """All ways give `want`, which is further from `moved_from` than they may be from it."""
    assert (want - moved_from).abs().max() > 1e-3 * moved_from.abs().max()
    for got in in_every_way(model, x):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))


class Adapter(nn.Module):
    """Low-rank adaptation (Hu et al. 2021) as PEFT has it: around a layer, whose weight it shows."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.5)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))

    def merge(self) -> nn.Linear:
        self.base_layer.weight.data += self.up.weight.data @ self.down.weight.data
        return self.base_layer


@EVERY
@torch.no_grad()
def test_adapters_around_linear_layers(name, options):
    """Each alone, on maps whose width is their channels, and merged."""
    model, x = model_of(name, **options), torch.randn(1, 3, 64, 64)
    for at, base in layers(model, nn.Linear):
        weight = base.weight.detach().clone()
        adapter = Adapter(base).eval()
        plain = model(x)
        replace(model, at, adapter)
        found = in_every_way(model, x)
        replace(model, at, adapter.merge())
        want = model(x)
        assert (want - plain).abs().max() > 1e-5 * plain.abs().max(), at
        for got in found:
            assert (got - want).abs().max() < 0.02 * (want - plain).abs().max() + 2e-6 * want.abs().max(), at
        base.weight.copy_(weight)


@NANO
def test_gradients_of_adapters(name):
    model = model_of(name).requires_grad_(False)
    for at, base in layers(model, nn.Linear):
        replace(model, at, Adapter(base))
    model(X).square().sum().backward()
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    assert len(adapters) > 10
    for adapter in adapters:
        assert all(float(part.weight.grad.norm()) > 0 for part in (adapter.down, adapter.up))


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.3 * weight


@EVERY
@pytest.mark.parametrize("kind", [*LAYERS, nn.LayerNorm, RMSNorm, nn.BatchNorm2d], ids=lambda kind: kind.__name__)
def test_parametrised_layers(name, options, kind):
    model, other = model_of(name, **options), model_of(name, **options)
    changed = layers(model, kind)
    if not changed:
        pytest.skip("has none")
    plain = model(X).detach()
    for at, layer in changed:
        parametrize.register_parametrization(layer, "weight", Scaled())
        other.get_submodule(at).weight.data *= 1.3
    check(model.eval(), other(X).detach(), plain)


@NANO
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_pruned_layers(name, kind):
    """The mask is applied by a hook before the call: to the weights as they are now."""
    model, other = model_of(name), model_of(name)
    changed = layers(model, kind)
    if not changed:
        pytest.skip("has none")
    plain = model(X).detach()
    for at, layer in changed:
        prune.l1_unstructured(layer, "weight", amount=0.3)
        layer.weight_orig.data *= 1.3
        other.get_submodule(at).weight.data = layer.weight_orig.data * layer.weight_mask
    with torch.no_grad():  # such weights cannot be copied after a call that wants derivatives
        model(X)
    want, ways = other(X).detach(), in_every_way_without_gradients(model)
    assert (want - plain).abs().max() > 1e-3 * plain.abs().max()
    for got in (*ways, model(X).detach()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))


@torch.no_grad()
def in_every_way_without_gradients(model):
    return in_every_way(model)


@NANO
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
@torch.no_grad()
def test_normed_weights(name, norm):
    model, other = model_of(name), model_of(name)
    plain, changed = model(X), layers(model)
    for _, layer in changed:
        norm(layer)
    model.eval()
    for n, p in model.named_parameters():
        if n.endswith(("weight_g", "original0")):
            p.data *= 1.2
    model(X)
    for at, layer in changed:
        other.get_submodule(at).weight.copy_(layer.weight)
    check(model, other(X), plain)


# ---- hooks ----


UNUSED = {"vim_nano": {"layers.0.drop_path"}}  # nothing comes before the first block


@pytest.mark.parametrize(("name", "options"), HOOKED, ids=str)
@pytest.mark.parametrize("way", ["gradients", "no gradients", "for_inference", "backward"])
def test_hooks_of_every_module_are_called(name, options, way):
    model, seen = model_of(name, **options), {}

    def note(module_name, _, args, result):
        seen.setdefault(module_name, []).append((args, result))

    modules = {n: m for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    for n, module in modules.items():
        register = module.register_full_backward_hook if way == "backward" else module.register_forward_hook
        register(functools.partial(note, n))
    want = model_of(name, **options)(X)
    if way == "for_inference":
        if onednn.problem(torch.float32) is not None:
            pytest.skip("this PyTorch has no oneDNN")
        model = for_inference(model)
    with torch.set_grad_enabled(way in ("gradients", "backward")):
        got = model(X)
        if way == "backward":
            got.sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    unused = UNUSED.get(name, set()) | {n for n in modules if n.split(".")[0] == "pool" and name == "vim_nano"}
    assert modules.keys() - seen.keys() <= unused


@torch.no_grad()
def test_hooks_see_what_the_layers_of_vim_compute():
    model, seen = model_of("vim_nano", img_size=32), {}
    mixer = model.layers[0].mixer
    for n in ("conv1d", "conv1d_b", "dt_proj", "dt_proj_b"):
        layer = getattr(mixer, n)
        layer.register_forward_hook(lambda layer, args, result, n=n: seen.update({n: (layer, args[0], result)}))
    model(X)
    for layer, given, result in seen.values():
        torch.testing.assert_close(result, type(layer).forward(layer, given))
    assert seen["dt_proj"][2].shape == (3, model.pos_embed.shape[1], mixer.D.shape[0])


@torch.no_grad()
def test_a_hook_changes_what_it_returns():
    for n in ("conv1d", "conv1d_b", "dt_proj", "dt_proj_b"):
        model = model_of("vim_nano")
        want = model(X)
        handle = model.get_submodule(f"layers.1.mixer.{n}").register_forward_hook(
            lambda layer, args, result: 2 * result
        )
        assert (model(X) - want).abs().max() > 1e-5
        handle.remove()
        assert torch.equal(model(X), want)


# ---- parameters that learn alone ----


# one family by default: a pass for each of its parameters
@pytest.mark.parametrize(
    "name", [name if name == "vmamba_nano" else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
)
def test_every_parameter_learns_alone_what_it_learns_among_others(name):
    """A layer whose weight is frozen must not lose the gradient of its bias, nor of the layer after it."""
    model = model_of(name, **FAMILIES[name])
    model(X).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.requires_grad_(False)
    for n in want:
        parameter = model.get_parameter(n)
        parameter.grad = None
        parameter.requires_grad_(True)
        model(X).square().sum().backward()
        assert parameter.grad is not None, n
        torch.testing.assert_close(parameter.grad, want[n], rtol=1e-3, atol=1e-4 * float(want[n].abs().max()) + 1e-6)
        parameter.requires_grad_(False)


# ---- quantised layers ----


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_dynamic_quantisation(name):
    """Of PyTorch itself, which takes layers of exactly `nn.Linear`: through `plain_layers` all of them."""
    model = model_of(name, **FAMILIES[name])
    copied = plain_layers(model)
    want = model(X)
    torch.testing.assert_close(copied(X), want, rtol=1e-4, atol=1e-5)
    assert copied.state_dict().keys() == model.state_dict().keys()
    total = len(layers(model, nn.Linear))
    for given, least in ((model, 1), (copied, total)):
        quantised = torch.ao.quantization.quantize_dynamic(given, {nn.Linear}, dtype=torch.qint8)
        count = sum("quantized" in type(m).__module__ and hasattr(m, "in_features") for m in quantised.modules())
        assert least <= count <= total
        got = quantised(X)
        assert 0 < (got - want).norm() < 0.1 * want.norm()
        assert F.cosine_similarity(got, want).min() > 0.99


class Packed(torch.Tensor):
    """A weight that can nothing but multiply, as those of torchao: eight bits and a scale per row."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.whole * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        raise NotImplementedError(str(function))


def packed(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return nn.Parameter(Packed((weight / scale).round().to(torch.int8), scale), requires_grad=False)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_weights_that_are_made_of_other_tensors(name):
    model = model_of(name, **FAMILIES[name])
    want = model(X)
    for _, layer in layers(model, nn.Linear):
        layer.weight = packed(layer.weight.data)
    for got in (model(X), with_gradients(model)):
        assert 0 < (got - want).norm() < 0.05 * want.norm()


@torch.enable_grad()
def with_gradients(model):
    return model(X).detach()
