"""Rates per layer are those of the whole model, however many of its layers the maps need."""

import pytest
from torch import nn

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from ssm_mm.layer_decay import LayerDecay  # noqa: E402
from ssm_models import DenseBackbone  # noqa: E402


def rates(out_indices: list[int]) -> dict[str, float]:
    model = nn.Module()
    model.backbone = DenseBackbone("vssd_nano", out_indices=out_indices)
    build = LayerDecay({"optimizer": {"type": "AdamW", "lr": 1.0}}, {"decay_rate": 0.5})
    groups = build(model).optimizer.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}


def test_rates_do_not_depend_on_the_maps():
    layers = DenseBackbone("vssd_nano").total_layers
    whole, first = rates(list(range(layers))), rates([0])
    assert len(first) < len(whole) and first == {name: whole[name] for name in first}
    assert {rate for name, rate in first.items() if ".patch_embed." in name} == {0.5 ** (layers + 1)}
    assert {rate for name, rate in first.items() if ".layers.0." in name} == {0.5**layers}
