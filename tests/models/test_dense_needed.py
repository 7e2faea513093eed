"""Of a dense backbone exists what its maps need, and nothing else: all of it trains, and files of whole models fit."""

import itertools

import pytest
import torch
import torch.nn as nn

from ssm_models import CheckpointError, DenseBackbone, load_checkpoint
from tests.models.golden import fill_model

STAGES = [indices for count in (1, 2, 3) for indices in itertools.combinations(range(3), count)]
VIM = [
    {"out_indices": (3,)},
    {"out_indices": (0, 1, 3, 4)},
    {"out_indices": (2,), "model_args": {"if_bidirectional": True}},
    *(
        {"out_indices": (last,), "model_args": {"use_residual_as_feature": True, "last_layer_process": process}}
        for last in (2, 5)
        for process in ("none", "add", "add & norm")
    ),
]
CASES = [(name, {"out_indices": i}) for name in ("vmamba_nano", "vssd_nano", "vssd_nano_iccv2025") for i in STAGES]
CASES += [("vim_nano", {"model_args": {}} | options) for options in VIM]


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_every_parameter_gets_a_gradient(name, options):
    backbone = DenseBackbone(name, **options)
    assert all(p.requires_grad for p in backbone.parameters())
    used = dict.fromkeys(name for name, module in backbone.named_modules() if not list(module.children()))
    for module in used:
        backbone.get_submodule(module).register_forward_hook(lambda *_, module=module: used.update({module: True}))
    sum((x * torch.randn_like(x)).sum() for x in backbone(torch.randn(2, 3, 32, 32))).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []
    weighty = [m for m, ran in used.items() if not ran and list(backbone.get_submodule(m).parameters())]
    # what the scans read the parameters of by themselves
    assert {m.rsplit(".", 1)[-1] for m in weighty} <= {"dt_proj", "dt_proj_b", "conv1d", "conv1d_b"}


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_files_of_whole_models_fit(name, options, tmp_path):
    """Maps are those of the whole backbone; the report names what a file has beyond them."""
    arguments = options.get("model_args", {})
    last = max(options["out_indices"])
    everything = (0, 1, 2) if name != "vim_nano" else tuple(sorted({*options["out_indices"], 5}))
    free = {"if_fpn": False} if name == "vim_nano" else {}
    whole = DenseBackbone(name, everything, model_args=arguments | free)
    part = DenseBackbone(name, options["out_indices"], model_args=arguments | free)
    fill_model(whole)
    detector = {f"backbone.{key}": value for key, value in whole.state_dict().items()} | {"neck.w": torch.ones(1)}
    torch.save({"state_dict": detector}, tmp_path / "detector.pth")
    report = load_checkpoint(part, tmp_path / "detector.pth")
    assert report.fresh == ()
    assert set(report.left_out) == {*(whole.state_dict().keys() - part.state_dict().keys()), "neck.w"}
    assert all(int(key.split(".")[1]) >= last for key in report.left_out if key.startswith("layers."))
    images = torch.randn(1, 3, 32, 32)
    wanted = dict(zip(everything, whole.eval()(images), strict=True))
    if arguments.get("use_residual_as_feature"):  # the last block alone is given out in another way
        wanted = {i: x for i, x in wanted.items() if i == last}
    for i, x in zip(options["out_indices"], part.eval()(images), strict=True):
        torch.testing.assert_close(x, wanted[i])

    stranger = {"backbone.layers.9.norm.weight": torch.ones(1), "backbone.layers.0.gone": torch.ones(1)}
    for key, value in stranger.items():
        torch.save({"state_dict": detector | {key: value}}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=f"unexpected {key.removeprefix('backbone.')}"):
            load_checkpoint(part, tmp_path / "other.pth")


def test_stages_count_from_the_whole_model():
    backbone = DenseBackbone("vmamba_nano", (1, 0), frozen_stages=3)
    assert backbone.out_indices == (0, 1) and backbone.out_channels == [32, 64]
    assert not any(p.requires_grad for p in backbone.layers.parameters())
    with pytest.raises(ValueError, match="frozen_stages=4 is not between -1 and 3"):
        DenseBackbone("vmamba_nano", (0,), frozen_stages=4)
    with pytest.raises(ValueError, match=r"out_indices=\(1, 1\) names a stage twice"):
        DenseBackbone("vmamba_nano", (1, 1))
    assert isinstance(backbone.layers[-1].downsample, nn.Identity)
