"""`for_inference`: the numbers of the model it was made from, for every size and family; what it refuses. And eager
inference, which takes products with what follows them in one pass."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import ssm_models
from ssm_models import for_inference
from ssm_models.layers import linear, onednn
from ssm_models.layers.conv2d import Conv2d, activated
from ssm_models.layers.linear import Linear, Linear2d, two_maps
from tests.models.test_timm_contract import EVERYTHING, small

needs_onednn = pytest.mark.skipif(onednn.problem(torch.float32) is not None, reason="this PyTorch has no oneDNN")
needs_bfloat16 = pytest.mark.skipif(onednn.problem(torch.bfloat16) is not None, reason="this processor has no bfloat16")
pytestmark = needs_onednn


def random_model(name: str, **options) -> nn.Module:
    """A small model in eval mode whose running statistics, norms and biases are not those of a new one."""
    model = small(name, **options)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data.add_(0.2 * torch.rand_like(tensor))
    return model.eval()


@pytest.mark.parametrize(("name", "options"), EVERYTHING, ids=str)
def test_the_same_results(name, options):
    model = random_model(name, **options)
    prepared = for_inference(model)
    assert type(prepared).__name__ == type(model).__name__ and isinstance(prepared, type(model))
    for size in ((1, 3, 64, 64), (3, 3, 48, 80)):
        x = torch.randn(size)
        with torch.inference_mode():
            want = model(x)
            for given in (x, x.to(memory_format=torch.channels_last)):
                torch.testing.assert_close(prepared(given), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
            features, wanted = prepared.forward_features(x), model.forward_features(x)
            torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    grown = model(x)  # the model itself is as it was, gradients included
    torch.testing.assert_close(grown, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    grown.sum().backward()


@needs_bfloat16
@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_bfloat16_is_what_autocast_gives(name):
    model = random_model(name)
    prepared, x = for_inference(model, torch.bfloat16), torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = (model(x).detach() - exact).norm()
    with torch.inference_mode():
        own = (prepared(x) - exact).norm()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert torch.equal(prepared(x), prepared(x))
        for_float32 = for_inference(model)
        with torch.autocast("cpu", torch.bfloat16):  # which the copy does not heed
            assert (for_float32(x) - exact).norm() < 0.01 * own
    assert own <= 1.5 * autocast


@needs_bfloat16
@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_features_of_bfloat16_have_the_dtypes_that_autocast_gives(name):
    model, x = random_model(name), torch.randn(1, 3, 32, 32)
    prepared = for_inference(model, torch.bfloat16)
    with torch.no_grad():
        got = [prepared(x), *prepared.forward_intermediates(x, intermediates_only=True)]
        with torch.autocast("cpu", torch.bfloat16):
            want = [model(x), *model.forward_intermediates(x, intermediates_only=True)]
    assert [t.dtype for t in got] == [t.dtype for t in want]


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_a_prepared_model_takes_another_head_and_no_images(name):
    prepared = for_inference(random_model(name))
    prepared.reset_classifier(3)
    with torch.no_grad():
        assert prepared(torch.randn(2, 3, 32, 32)).shape == (2, 3)
        assert prepared(torch.randn(0, 3, 32, 32)).shape == (0, 3)


def test_layers_of_others_stay():
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Linear(16, 16)).eval()
    prepared = for_inference(other)
    assert type(prepared[0]) is nn.Conv2d and type(prepared[2]) is linear.PackedLinear


def test_twice_is_once_and_another_dtype_is_refused():
    prepared = for_inference(random_model("vim_nano"))
    assert for_inference(prepared) is prepared
    with pytest.raises(ValueError, match=r"prepared for torch.float32; prepare the original for torch.bfloat16"):
        for_inference(prepared, torch.bfloat16)


def test_what_it_refuses():
    model = small("vmamba_nano")
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        for_inference(model.train())
    model.eval().layers[0].train()
    with pytest.raises(ValueError, match="in eval mode"):
        for_inference(model)
    with pytest.raises(ValueError, match=r"dtype=torch.float16 is not one of torch.float32, torch.bfloat16"):
        for_inference(model.eval(), torch.float16)
    with pytest.raises(ValueError, match=r"float32 weights on the CPU; .* is torch.bfloat16 on cpu"):
        for_inference(small("vmamba_nano").bfloat16().eval())
    with pytest.raises(ValueError, match="on meta"):
        for_inference(timm.create_model("vmamba_nano", device="meta").eval())


def test_what_a_prepared_model_refuses():
    prepared = for_inference(random_model("vmamba_nano"))
    with pytest.raises(RuntimeError, match="cannot train; take the one it was made from"):
        prepared.train()
    assert prepared.eval() is prepared
    with pytest.raises(RuntimeError, match="save the one it was made from"):
        prepared.state_dict()
    with pytest.raises(TypeError, match="prepare the original again"):
        copy.deepcopy(prepared)
    with pytest.raises(RuntimeError, match="has no gradients"):
        prepared(torch.randn(1, 3, 32, 32, requires_grad=True))
    x = torch.randn(1, 3, 32, 32)
    for make in (torch.export.export, torch.jit.trace):
        with pytest.raises(Exception, match="cannot be compiled or exported; take the one it was made from"):
            make(prepared, (x,))
    with torch.no_grad():  # a compiler that may leave parts to Python leaves all of it
        torch.testing.assert_close(torch.compile(prepared, backend="eager")(x), prepared(x))


def test_a_prepared_model_holds_its_weights_once():
    model = random_model("vssd_nano")
    prepared = for_inference(model)
    mine = sum(p.numel() for p in model.parameters())
    packed = sum(m.packed.numel() for m in prepared.modules() if isinstance(m, linear.PackedLinear))
    left = sum(p.numel() for p in prepared.parameters())
    assert packed > 0.5 * mine and packed + left <= mine


# ---- eager inference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Linear, Linear2d])
@pytest.mark.parametrize("tokens", [1, 12, 12000])
def test_two_maps_in_parts(kind, tokens, monkeypatch):
    monkeypatch.setattr(linear, "HIDDEN_BYTES", 1 << 16)  # parts of 341 tokens
    first, act, second = kind(16, 48), nn.GELU(), kind(48, 16)
    x = torch.randn(2, tokens // 2 or 1, 16) if kind is Linear else torch.randn(2, 2, tokens // 4 or 1, 16)
    with torch.no_grad():
        got = two_maps(first, act, second, x)
        torch.testing.assert_close(got, second(act(first(x))), rtol=1e-5, atol=1e-6)
    assert two_maps(first, act, second, x) is None  # the weights want gradients


def test_hooks_see_what_they_wait_for():
    mlp = ssm_models.layers.mlp.Mlp(16, 64).eval()
    seen = []
    x = torch.randn(2, 3, 3, 16)
    for part in (mlp.fc1, mlp.act):
        handle = part.register_forward_hook(lambda module, args, result: seen.append(result))
        with torch.no_grad():
            y = mlp(x)
        handle.remove()
    assert torch.equal(seen[1], F.gelu(seen[0])) and seen[0].shape == (2, 3, 3, 64)
    torch.testing.assert_close(y, mlp(x).detach())


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.ReLU(), nn.Identity(), nn.Sigmoid()], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolutions_with_their_activation(act, layout):
    conv, x = Conv2d(16, 16, 3, padding=1, groups=16), torch.randn(2, 16, 7, 9).to(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(activated(conv, act, x), act(conv(x)), rtol=1e-5, atol=1e-6)


def test_counters_and_modes_see_the_same_operators_as_with_gradients():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = random_model("vmamba_nano"), torch.randn(1, 3, 32, 32)
    counts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_weight_of_another_dtype_is_an_error_as_in_pytorch():
    with torch.no_grad(), pytest.raises(RuntimeError, match="same"):
        Linear(16, 16).bfloat16()(torch.randn(2, 3, 16))
