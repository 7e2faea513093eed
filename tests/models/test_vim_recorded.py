"""Vim against recorded numbers of the official implementation: outputs, stages, gradients, keys."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from ssm_models.upstream.vim import build
from ssm_models.vim import VARIANTS
from tests.models.golden import assert_matches, fill_model, image, probe

DATA = Path(__file__).parent.parent / "data" / "vim"
GOLDENS = sorted(path.stem for path in (DATA / "goldens").glob("*.json"))
MANIFESTS = sorted(path.stem for path in (DATA / "keys").glob("*.json"))
TINY = [name for name in GOLDENS if name.startswith("tiny")]


def record_of(name: str) -> dict:
    return json.loads((DATA / "goldens" / f"{name}.json").read_text())


def manifest(name: str) -> dict:
    return json.loads((DATA / "keys" / f"{name}.json").read_text())


def run(model, record, dtype, tolerance):
    """Forward and loss, and the comparison of outputs and recorded stages; returns input, loss."""
    model = fill_model(model).to(dtype)
    seen = {}
    for name in {stage.split("[")[0] for stage in record["stages"]}:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    x = image(record["input_shape"]).to(dtype).requires_grad_()
    y = model(x)
    rms = record["logits"]["l2"] / math.sqrt(math.prod(record["logits"]["shape"]))
    np.testing.assert_allclose(y[:, :16].detach(), record["logits"]["first16"], rtol=0, atol=4 * tolerance * rms)
    assert_matches(y, record["logits"], tolerance, "logits")
    for stage, want in record["stages"].items():
        name, _, index = stage.partition("[")  # "layers.3[0]": what the mixer adds, "[1]": the residual stream
        assert_matches(seen[name][int(index[0])] if index else seen[name], want, tolerance, stage)
    loss = y.square().mean()
    assert float(loss.detach()) == pytest.approx(record["loss"], rel=10 * tolerance)
    return x, loss


def check_gradients(model, record, x, loss, tolerance):
    loss.backward()
    parameters = dict(model.named_parameters())
    assert set(record["grad_l2"]) == set(parameters)
    for name, norm in record["grad_l2"].items():
        assert float(parameters[name].grad.double().norm()) == pytest.approx(norm, rel=tolerance), name
    for name, value in record["grad_probe"].items():
        assert abs(probe(parameters[name].grad) - value) <= tolerance * record["grad_l2"][name], name
    assert float(x.grad.double().norm()) == pytest.approx(record["grad_input_l2"], rel=tolerance)


@pytest.mark.parametrize("name", TINY)
def test_float64_and_its_gradients(name):
    record = record_of(name)
    model = build(record["config"])
    check_gradients(model, record, *run(model, record, torch.float64, 1e-11), 1e-10)


@torch.no_grad()
def test_float64_at_full_size():
    record = record_of("vim_tiny_patch16_224")
    run(build(record["config"]), record, torch.float64, 1e-11)


@pytest.mark.parametrize("name", GOLDENS)
def test_float32_and_its_gradients(name):
    record = record_of(name)
    model = build(record["config"])
    check_gradients(model, record, *run(model, record, torch.float32, max(5e-6, 5 * record["noise"])), 1e-3)


@pytest.mark.parametrize("name", MANIFESTS)
def test_keys_shapes_order_and_counts(name):
    stored = manifest(name)
    with torch.device("meta"):
        models = [build(stored["config"])]
        if name in VARIANTS:
            models.append(timm.create_model(name))
    for model in models:
        assert list(stored["keys"].items()) == [(key, list(v.shape)) for key, v in model.state_dict().items()]
        assert sum(p.numel() for p in model.parameters()) == stored["n_params"]
