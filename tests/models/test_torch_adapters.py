"""PEFT and torchao, where they are installed; test_torch_layers.py has the same with adapters of its own."""

import copy

import pytest
import torch
from torch import nn

from tests.models.test_torch_func import FAMILIES, X, model_of

EVERY = pytest.mark.parametrize("name", FAMILIES)


@EVERY
@torch.no_grad()
def test_lora_of_every_linear_layer(name):
    peft = pytest.importorskip("peft")
    model = model_of(name)
    want, names = model(X), [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=names)).eval()
    torch.testing.assert_close(wrapped(X), want, rtol=1e-4, atol=1e-5)  # adapters start from zero
    for layer in (wrapped.base_model.get_submodule("model." + n) for n in names):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
        alone = copy.deepcopy(layer.base_layer).weight
        assert alone.shape == layer.get_delta_weight("default").shape
    got = wrapped(X)
    assert (got - want).norm() > 0.05 * want.norm()
    for n in names:  # the definition, on weights
        layer = wrapped.base_model.get_submodule("model." + n)
        model.get_submodule(n).weight += layer.get_delta_weight("default")
    torch.testing.assert_close(got, model(X), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(wrapped.merge_and_unload()(X), model(X), rtol=1e-4, atol=1e-5)


@EVERY
def test_lora_learns(name):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model_of(name), peft.LoraConfig(r=4, target_modules="all-linear"))
    for n, p in wrapped.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.2)
    wrapped(X).square().sum().backward()
    learning = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(learning) > 8 and all("lora" in n and float(g.norm()) > 0 for n, g in learning.items())


@EVERY
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@torch.no_grad()
def test_torchao(name, kind):
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of(name)
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, getattr(quantization, kind)())
    changed = [m for m in quantised.modules() if isinstance(m, nn.Linear) and type(m.weight.data) is not torch.Tensor]
    assert len(changed) == sum(isinstance(m, nn.Linear) for m in model.modules())
    want, got = model(X), quantised(X)
    assert 0 < (got - want).norm() < 0.05 * want.norm()
