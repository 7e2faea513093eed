"""Vim's modules against recorded numbers of the official ones, and both directions of its mixer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_models.layers.bimamba import BiMamba
from ssm_models.layers.norm import RMSNorm
from ssm_models.layers.rope import GridRope
from ssm_models.vim import VimBlock
from ssm_ops import causal_conv1d
from ssm_ops._library import OPERATORS, available
from tests.models.golden import fill_model
from tests.models.small_vim import small

DATA = Path(__file__).parent.parent / "data" / "vim"


MODULES = json.loads((DATA / "modules.json").read_text())
OUTPUTS = np.load(DATA / "modules.npz")


def drawn(description: str) -> torch.Tensor:
    """'PCG64(4321).standard_normal([2, 11, 8]) float32' -> that tensor, in float64"""
    seed, shape = description.removeprefix("PCG64(").split(").standard_normal(")
    shape = json.loads(shape.split(")")[0])
    noise = np.random.Generator(np.random.PCG64(int(seed))).standard_normal(shape)
    return torch.from_numpy(noise.astype("f4")).double()


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1d = torch.nn.Conv1d(6, 6, 4, groups=6)

    def forward(self, x):
        return causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")


class AddAndNorm(torch.nn.Module):
    """A block without a mixer; hidden state and residual stream side by side."""

    def __init__(self, norm):
        super().__init__()
        block = VimBlock(12, torch.nn.Identity(), norm, drop_path=0.0, residual_in_fp32=True)
        self.norm, self.block = norm, [block]

    def forward(self, x):
        return torch.cat(self.block[0](*x.chunk(2, dim=1)), 1)


class Rotation(torch.nn.Module):
    """Tokens of a 4x4 grid, behind a class token if there is one more."""

    def __init__(self, pt_seq_len, head):
        super().__init__()
        self.rope, self.head = GridRope(16, (4, 4), pt_seq_len), head

    def forward(self, x):
        return torch.cat([x[:, : self.head], self.rope(x[:, self.head :], (4, 4))], 1)


def make_module(name: str, impl: str = "auto") -> torch.nn.Module:
    case = MODULES[name]
    if name.startswith("mamba"):
        return BiMamba(**case["kwargs"], impl=impl)
    if name.startswith("rope"):
        return Rotation(case["kwargs"]["pt_seq_len"], int("cls" in name))
    return {
        "causal_conv1d_silu": Convolution,
        "fused_add_rms": lambda: AddAndNorm(RMSNorm(12)),
        "fused_add_ln": lambda: AddAndNorm(torch.nn.LayerNorm(12)),
    }[name]()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module(name):
    case = MODULES[name]
    module = make_module(name)
    for table in ("freqs_cos", "freqs_sin"):
        if f"{name}/{table}" in OUTPUTS:
            np.testing.assert_array_equal(getattr(module.rope, table), OUTPUTS[f"{name}/{table}"])
    module = fill_model(module).double()
    assert {key.removeprefix("rope."): list(v.shape) for key, v in module.state_dict().items()} == case["keys"]
    x = drawn(case["x"]).requires_grad_()
    y = module(x)
    y.backward(drawn(case["dy"]))
    for got, part in ((y, "y"), (x.grad, "dx")):
        np.testing.assert_allclose(got.detach(), OUTPUTS[f"{name}/{part}"], rtol=1e-6, atol=1e-6)
    for key, norm in case["grad_l2"].items():
        assert float(module.get_parameter(key).grad.norm()) == pytest.approx(norm, rel=1e-9), key


@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
def test_implementations_agree(bimamba_type):
    operator = OPERATORS["selective_scan"]
    x = torch.randn(2, 19, 16)
    kwargs = {"d_model": 16, "bimamba_type": bimamba_type}
    exact = fill_model(BiMamba(**kwargs, impl="reference")).double()(x.double())
    for impl in ["auto", *available(operator, "cpu", torch.float32)]:
        y = fill_model(BiMamba(**kwargs, impl=impl))(x)
        assert (y - exact).norm() <= 2e-6 * exact.norm(), impl


@pytest.mark.parametrize("impl", ["cpu", "cuda", "triton", "reference"])
def test_the_convolution_needs_no_kernel_of_the_name_of_the_scan(impl):
    x = torch.randn(1, 7, 16)
    exact = fill_model(BiMamba(8, impl="reference"))
    mixer = fill_model(BiMamba(8, impl=impl))
    torch.testing.assert_close(mixer._conv(x, mixer.conv1d), exact._conv(x, exact.conv1d))


@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_which_tokens_see_which(bimamba_type, d_conv):
    """One direction hides what comes later from a token; with two every token sees all others."""
    mixer = fill_model(BiMamba(16, d_conv=d_conv, bimamba_type=bimamba_type)).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    for changed in range(6):
        other = x.clone()
        other[:, changed] += 1
        differs = ((mixer(other) - mixer(x)).abs().amax((0, 2)) > 1e-9).tolist()
        assert differs == [bimamba_type != "none" or t >= changed for t in range(6)]


def test_the_way_back_is_the_way_forth_over_the_reversed_sequence():
    """With the same parameters for both, and no division, reversing tokens reverses the output."""
    mixer = fill_model(BiMamba(16, bimamba_type="v2"))
    for name, parameter in mixer.named_parameters():
        if "_b." in name or name in ("A_b_log", "D_b"):
            parameter.data.copy_(mixer.get_parameter(name.replace("A_b_log", "A_log").replace("_b", "")))
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(mixer(x.flip(1)), mixer(x).flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("bimamba_type", ["v1", "v2"])
def test_the_way_back_is_never_left_out(bimamba_type, impl):
    model = small(bimamba_type=bimamba_type, scan_impl=impl)
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    before.square().mean().backward()
    leaves = {"v1": ["A_b_log"], "v2": ["A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight"]}
    leaves["v2"] += ["dt_proj_b.weight", "dt_proj_b.bias"]
    for leaf in leaves[bimamba_type]:
        parameter = model.layers[0].mixer.get_parameter(leaf)
        assert parameter.grad.norm() > 1e-6, leaf
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(1.0)
            assert (model(x) - before).abs().max() > 1e-5, leaf
            parameter.copy_(kept)


def test_divide_out_halves_v2_alone():
    for bimamba_type, factor in (("none", 1), ("v1", 1), ("v2", 2)):
        x = torch.randn(1, 5, 16)
        halved, whole = (fill_model(BiMamba(16, bimamba_type=bimamba_type, if_divide_out=b))(x) for b in (True, False))
        torch.testing.assert_close(factor * halved, whole)
