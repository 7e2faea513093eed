"""fvcore with our handles counts what the model cards count."""

import sys

import pytest
import timm
import torch
from torch import nn

import ssm_ops
from analyze.flops import main
from analyze.impl import flops
from ssm_models import fvcore_handles, model_card

FlopCountAnalysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_modules_of_small_models(name):
    """The whole tree, in all three conventions."""
    size = (3, 32, 64) if name == "vssd_nano" else (3, 32, 32)
    modules = flops.tree(name, size, 9, "fvcore")
    assert modules == flops.tree(name, size, 9) and len(modules) > 30
    card = model_card(name, size)
    assert modules[0][3:] == (card.macs, card.macs_recurrence, card.macs_official)


def test_published_number_of_a_whole_model():
    """With nothing but what the documentation tells a user to write."""
    model = timm.create_model("vmamba_tiny_s1l8").eval()
    image = torch.zeros(1, 3, 224, 224)
    assert FlopCountAnalysis(model, image).set_op_handle(**fvcore_handles()).total() == 4_905_609_984


@pytest.mark.full
@pytest.mark.parametrize("name", ["vanilla_vmamba_tiny", "vim_tiny_patch16_224", "vssd_micro", "vmamba_tiny_m2"])
def test_whole_models(name):
    card, counts = model_card(name), flops.fvcore_counts(name, (3, 224, 224))
    assert counts[""] == (card.macs, card.macs_recurrence, card.macs_official)


class Mixer(nn.Module):
    """A network of somebody else around one operator; its parameters are inputs of the operator."""

    def __init__(self, operator, *shapes, **options):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(-torch.rand(shape)) for shape in shapes)
        self.operator, self.options = operator, options

    def forward(self, x):
        return self.operator(x, *self.weights, **self.options)


D, N, R = 6, 3, 2
OPERATORS = {
    "selective_scan": (Mixer(ssm_ops.selective_scan, (1, D, 5), (D, N), (1, 1, N, 5), (1, 1, N, 5)), (1, D, 5)),
    "ss2d_scan": (
        Mixer(ssm_ops.ss2d_scan, (1, 2, 3, 4 * (R + 2 * N)), (4, D, R), (4 * D, N), (4 * D,), (4 * D,)),
        (1, D, 2, 3),
    ),
    "bidirectional_scan": (
        Mixer(
            ssm_ops.bidirectional_scan, (1, 5, D), (1, 5, 2 * (R + 2 * N)), (2, D, R), (2 * D, N), (2 * D,), (2 * D,)
        ),
        (1, 5, D),
    ),
    # 5 tokens in chunks of 2, so that a chunk is broken
    "ssd_chunk_scan": (
        Mixer(ssm_ops.ssd_chunk_scan, (1, 5, 2), (2,), (1, 5, 1, N), (1, 5, 1, N), chunk_size=2),
        (1, 5, 2, 3),
    ),
    "nc_ssd": (Mixer(ssm_ops.nc_ssd, (1, 5, 2), (2,), (1, 5, 1, N), (1, 5, 1, N)), (1, 5, 2, 3)),
    "causal_conv1d": (Mixer(ssm_ops.causal_conv1d, (D, 4), (D,), activation="silu"), (1, D, 5)),
    "cross_scan": (Mixer(ssm_ops.cross_scan), (1, D, 2, 3)),
    "cross_merge": (Mixer(ssm_ops.cross_merge), (1, 4, D, 2, 3)),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("convention", ["hardware_aware", "recurrence"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_in_any_network(operator, convention, gradients):
    """As PyTorch's counter has them, under autograd and without, and none is unknown to fvcore."""
    from torch.utils.flop_counter import FlopCounterMode

    mixer, shape = OPERATORS[operator]
    x = torch.rand(shape)
    with torch.set_grad_enabled(gradients):
        counted = FlopCountAnalysis(mixer, x).set_op_handle(**ssm_ops.fvcore_handles(convention))
        got = counted.unsupported_ops_warnings(False).total()
        unknown = [name for name in counted.unsupported_ops() if not name.startswith("aten::")]
        with FlopCounterMode(display=False, custom_mapping=ssm_ops.flop_formulas(convention)) as counter:
            mixer(x)
    assert 2 * got == counter.get_total_flops() and (got > 0) == (not operator.startswith("cross"))
    assert unknown == []


@pytest.mark.parametrize("name, pooled", [("vmamba_nano", 128 * 2 * 2), ("vssd_nano", 0)])
def test_pooling_of_a_part_of_a_larger_network(name, pooled):
    """Channels last it is a mean, which VMamba's tables count and VSSD's do not."""
    norm = {"norm_layer": "ln"} if name == "vmamba_nano" else {}
    network = nn.Sequential(timm.create_model(name, **norm).eval(), nn.Linear(10, 3))
    counted = FlopCountAnalysis(network, torch.rand(1, 3, 32, 32)).set_op_handle(**fvcore_handles())
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert counted.total() == model_card(network[0], (3, 32, 32)).macs + 10 * 3
    assert counted.by_operator()["mean"] == pooled


def test_the_command_counts_by_fvcore(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["--models", "vssd_nano", "--counter", "fvcore", "--tree", "0"]) == 0
    card = model_card("vssd_nano", (3, 32, 32))
    giga = [f"{n / 1e9:.6f}" for n in (card.macs, card.macs_recurrence, card.macs_official)]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["vssd_nano", "32x32", "506,072", *giga, "-"] in lines
    assert ["(model)", "VSSD", "506,072", giga[0], "100.0%", *giga[1:]] in lines
    flops.fvcore_counts.cache_clear()
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    assert main(["--models", "vssd_nano", "--counter", "fvcore"]) == 2
    assert capsys.readouterr().err == "error: --counter fvcore needs the package fvcore: pip install fvcore\n"


@pytest.mark.parametrize("handles", [fvcore_handles, ssm_ops.fvcore_handles])
def test_unknown_convention_is_named(handles):
    with pytest.raises(ValueError, match="convention='naive' is not one of hardware_aware, recurrence"):
        handles("naive")
