"""The memory of backbones: ours needs no more than Swin-T, and the csv holds what was counted."""

import csv

import pytest
import torch

pytest.importorskip("mmdet")
pytestmark = pytest.mark.dense

from analyze.backbone_memory import main  # noqa: E402
from analyze.impl import backbone_memory  # noqa: E402


@pytest.mark.full
def test_no_more_than_swin(tmp_path, capsys):
    assert main(["--size", "256", "416", "--device", "cpu", "--out", str(tmp_path / "m.csv")]) == 0
    ours, swin = csv.DictReader((tmp_path / "m.csv").open())
    assert (ours["backbone"], swin["backbone"]) == ("vmamba_tiny_s1l8", backbone_memory.SWIN)
    # 27.5 M is Swin-T without its classifier, with a norm on every map
    assert int(swin["parameters"]) == 27_520_698 and (swin["height"], swin["width"]) == ("256", "416")
    assert 0.5 * float(swin["peak_mib"]) < float(ours["peak_mib"]) <= float(swin["peak_mib"])
    assert main(["--models", "vmamba_tinny"]) == 2
    assert "'vmamba_tinny' is not a model of the zoo" in capsys.readouterr().err


def test_a_step_leaves_no_gradients():
    layer = torch.nn.Conv2d(3, 4, 1)
    seen = []
    layer.weight.register_hook(seen.append)
    backbone_memory.step_of(torch.nn.Sequential(layer, Tuple()), torch.ones(1, 3, 2, 2))()
    assert torch.equal(seen[0], torch.full((4, 3, 1, 1), 4.0)) and layer.weight.grad is None


class Tuple(torch.nn.Module):
    def forward(self, x):
        return (x,)
