"""VSSD against recorded numbers of the official implementation, and from its descriptions."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from ssm_models import DenseVSSD
from ssm_models.layers.attention import Attention
from ssm_models.layers.conv_stem import ConvDownsample, ConvStem, SimpleDownsample, SimpleStem
from ssm_models.layers.nc_ssd import NCSSD
from ssm_models.upstream.vssd import build
from ssm_models.vssd import VARIANTS, VSSD, VSSDBlock
from ssm_ops._library import OPERATORS, available
from tests.models import golden
from tests.models.golden import assert_matches, image, probe

DATA = Path(__file__).parent.parent / "data" / "vssd"
GOLDENS = sorted(path.stem for path in (DATA / "goldens").glob("*.json"))
MANIFESTS = sorted(path.stem for path in (DATA / "keys").glob("*.json"))
TINY = [name for name in GOLDENS if name.startswith("tiny")]


def record_of(name: str) -> dict:
    return json.loads((DATA / "goldens" / f"{name}.json").read_text())


def manifest(name: str) -> dict:
    return json.loads((DATA / "keys" / f"{name}.json").read_text())


def fill(name: str, shape) -> torch.Tensor:
    """Fill rule v1, see golden.py, for VSSD's names."""
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "dt_bias":
        dt = np.exp(rng.random(shape) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        value = dt + np.log(-np.expm1(-dt))
    elif leaf == "A_log":
        value = np.log(np.arange(1, shape[-1] + 1)) + 0.02 * rng.standard_normal(shape)
    elif leaf == "D":
        value = 1 + 0.02 * rng.standard_normal(shape)
    else:
        value = golden.fill(name, tuple(shape))
    return torch.from_numpy(value.astype(np.float32))


def fill_module(module: torch.nn.Module) -> torch.nn.Module:
    state = {name: v if "num_batches" in name else fill(name, v.shape) for name, v in module.state_dict().items()}
    module.load_state_dict(state, strict=True)
    return module.eval()


def run(model, record, dtype, tolerance):
    """Forward and loss, and the comparison of outputs and recorded stages; returns input, loss."""
    model = fill_module(model).to(dtype)
    seen = {}
    for name in record["stages"]:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.flatten(1, 2)})
        )
    x = image(record["input_shape"]).to(dtype).requires_grad_()
    y = model(x)
    if "logits" in record:
        rms = record["logits"]["l2"] / math.sqrt(math.prod(record["logits"]["shape"]))
        np.testing.assert_allclose(y[:, :16].detach(), record["logits"]["first16"], rtol=0, atol=4 * tolerance * rms)
        assert_matches(y, record["logits"], tolerance, "logits")
        loss = y.square().mean()
    else:
        for i, (got, want) in enumerate(zip(y, record["features"], strict=True)):
            assert_matches(got, want, tolerance, f"features {i}")
        loss = sum(m.square().mean() for m in y)
    assert set(seen) == set(record["stages"])
    for name, value in seen.items():
        assert_matches(value, record["stages"][name], tolerance, name)
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


@pytest.mark.parametrize("name", [*TINY, "vssd_micro_224"])
def test_float64_and_its_gradients(name):
    record = record_of(name)
    model = build(record["config"], backbone="backbone" in name)
    x, loss = run(model, record, torch.float64, 1e-11)
    check_gradients(model, record, x, loss, 1e-10)


@pytest.mark.parametrize("name", GOLDENS)
def test_float32(name):
    """Without gradients: a ReLU near zero that float32 rounds to the other side changes them by 1e-3."""
    record = record_of(name)
    model = build(record["config"], backbone="backbone" in name)
    run(model, record, torch.float32, max(5e-6, 5 * record["noise"]))


def test_float32_gradients_where_no_relu_is_near_zero():
    record = record_of("tiny_vssd_base")
    model = build(record["config"])
    check_gradients(model, record, *run(model, record, torch.float32, 5e-6), 1e-4)


def test_mlp_ratio():
    """The same model as tiny_vssd_base with mlp_ratio=2; recorded in float32."""
    model = fill_module(build({**record_of("tiny_vssd_base")["config"], "mlp_ratio": 2.0}))
    recorded = {"shape": [2, 100], "mean": -0.0135402088, "std": 0.6627765651, "l2": 9.375031866, "probe": -11.76195818}
    assert_matches(model(image([2, 3, 64, 64])), recorded, 5e-6, "logits")


@pytest.mark.parametrize("name", MANIFESTS)
def test_keys_shapes_order_and_counts(name):
    stored = manifest(name)
    with torch.device("meta"):
        models = [build(stored["config"], backbone="backbone" in name)]
        if name.removesuffix("_224") in VARIANTS:
            models.append(timm.create_model(name.removesuffix("_224")))
    for model in models:
        assert list(stored["keys"].items()) == [(key, list(v.shape)) for key, v in model.state_dict().items()]
        assert sum(p.numel() for p in model.parameters()) == stored["n_params"]


# ---- modules ----

MODULES = json.loads((DATA / "modules.json").read_text())
OUTPUTS = np.load(DATA / "modules.npz")


def drawn(description: str) -> torch.Tensor:
    """'PCG64(4321).standard_normal([2, 15, 8]) float32' -> that tensor, in float64"""
    seed, shape = description.removeprefix("PCG64(").split(").standard_normal(")
    shape = json.loads(shape.split(")")[0])
    noise = np.random.Generator(np.random.PCG64(int(seed))).standard_normal(shape)
    return torch.from_numpy(noise.astype("f4")).double()


def make_module(name: str, impl: str = "auto") -> torch.nn.Module:
    if name.startswith("mixer"):
        kwargs = {n.replace("positve", "positive"): v for n, v in MODULES[name]["kwargs"].items() if n != "d_conv"}
        return NCSSD(**kwargs, impl=impl)
    if name.startswith("block"):
        attn = Attention(16, 4) if name == "block_standard" else NCSSD(16, d_state=8, headdim=8, impl=impl)
        return VSSDBlock(16, attn, mlp_ratio=4.0, drop=0.0, drop_path=0.0)
    return {
        "standard_attn": lambda: Attention(16, 4),
        "stem": lambda: ConvStem(3, 16),
        "simple_stem": lambda: SimpleStem(3, 16),
        "patch_merging": lambda: ConvDownsample(8),
        "simple_patch_merging": lambda: SimpleDownsample(8),
    }[name]()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module(name):
    case = MODULES[name]
    module = fill_module(make_module(name)).double()
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == case["keys"]
    recorded = drawn(case["x"])
    x = recorded.unflatten(1, (5, 3)) if recorded.dim() == 3 else recorded
    x.requires_grad_()
    y = module(x)
    y.backward(drawn(case["dy"]).view_as(y))
    for got, part in ((y, "y"), (x.grad, "dx")):
        want = OUTPUTS[f"{name}/{part}"]
        np.testing.assert_allclose(got.detach().reshape(want.shape), want, rtol=1e-6, atol=1e-6)
    for key, norm in case["grad_l2"].items():
        assert float(module.get_parameter(key).grad.norm()) == pytest.approx(norm, rel=1e-9), key


@pytest.mark.parametrize("name", ["mixer_nc_g2", "mixer_nc_neg_dA", "mixer_causal_bidir_g2"])
def test_implementations_agree(name):
    operator = OPERATORS["ssd_chunk_scan" if "causal" in name else "nc_ssd"]
    x = torch.randn(2, 9, 7, 16)
    exact = fill_module(make_module(name, "reference")).double()(x.double())
    for impl in ["auto", *available(operator, "cpu", torch.float32)]:
        y = fill_module(make_module(name, impl))(x)
        assert (y - exact).norm() <= 2e-6 * exact.norm(), impl


def test_nc_ssd_is_the_same_whatever_the_order_of_the_tokens_and_causal_is_not():
    x = torch.randn(1, 6, 5, 16)
    for causal in (False, True):
        mixer = NCSSD(16, d_state=8, headdim=8, linear_attn_duality=not causal)
        torch.nn.init.zeros_(mixer.conv2d.weight)
        mixer.conv2d.weight.data[:, :, 1, 1] = 1.0  # no mixing of neighbours
        same = torch.allclose(mixer(x.flip(1)), mixer(x).flip(1), atol=1e-6)
        assert same != causal


# ---- upstream's descriptions ----


def shape_of(model) -> dict:
    return {name: tuple(v.shape) for name, v in model.state_dict().items()}


@pytest.mark.parametrize(
    "name, variant",
    [
        ("vssd_micro_e300", "vssd_micro"),
        ("classification/configs/vssd/vssd_tiny_e300.yaml", "vssd_tiny"),
        ("vssd_tiny_na_e300.yaml", "vssd_tiny"),
        ("vssd_small_e300", "vssd_small"),
        ("vssd_base_e300.yaml", "vssd_base"),
        ("vssd_base_e300_with_mesa.pth", "vssd_base"),
        ("vssd_tiny_best_ema.pth", "vssd_tiny"),
        ("vssd_micro", "vssd_micro"),
    ],
)
def test_published_names(name, variant):
    with torch.device("meta"):
        assert shape_of(build(name)) == shape_of(timm.create_model(variant))
        dense = build(f"Backbone_VMAMBA2 of {name}, out_indices 0..3", backbone=True)
    assert isinstance(dense, DenseVSSD)


def test_reads_yaml_sections():
    part = {"EMBED_DIM": 32, "DEPTHS": [1, 1, 2, 1], "NUM_HEADS": [2, 4, 8, 16], "D_STATE": 16, "SSD_POSITVE_DA": False}
    section = {"TYPE": "vmamba2", "NAME": "mine", "NUM_CLASSES": 11, "DROP_PATH_RATE": 0.1, "VMAMBA2": part}
    part |= {"LINEAR_ATTN_DUALITY": True, "LEPE": False, "SSD_EXPAND": 1, "PATCH_SIZE": 4}
    model = build(section)
    assert isinstance(model, VSSD) and model.num_classes == 11 and model.dims == [32, 64, 128, 256]
    mixer = model.layers[0].blocks[0].attn
    assert not mixer.positive and mixer.in_proj.weight.shape == (2 * 32 + 2 * 16 + 2, 32)
    assert model.layers[3].blocks[0].drop_path.drop_prob == 0.1
    part["DROP_PATH_RATE"] = 0.3
    assert build(section).layers[3].blocks[0].drop_path.drop_prob == 0.3
    with pytest.raises(ValueError, match="DEPHTS: 1 is not a key of upstream's MODEL section"):
        build({**section, "DEPHTS": 1})
    part["DEPHTS"] = [1]
    with pytest.raises(ValueError, match="DEPHTS"):
        build(section)


@pytest.mark.parametrize(
    "config, message",
    [
        ("vssd_huge", "'vssd_huge' is not a published VSSD; known: vssd_micro"),
        ("", "'' is not a published VSSD"),
        ({"depht": 3}, "depht: 3 is not an argument of upstream's VMAMBA2"),
        ({"patch_size": 16}, "patch_size=16: VSSD has 4 there and nothing else"),
        ({"out_indices": (0,)}, "unexpected keyword argument 'out_indices'"),
    ],
)
def test_names_what_it_does_not_know(config, message):
    with pytest.raises(ValueError) as caught:
        build(config)
    assert message in str(caught.value)


def test_dense_backbone_picks_stages_and_takes_odd_sizes():
    config = record_of("tiny_vssd_backbone")["config"]
    model = build({**config, "out_indices": (1, 3)}, backbone=True)
    maps = model(torch.randn(1, 3, 230, 250))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 29, 32), (1, 256, 8, 8)] and all(m.is_contiguous() for m in maps)
    assert {n.split(".")[0] for n in model.state_dict()} == {"patch_embed", "layers", "outnorm1", "outnorm3"}
    with pytest.raises(ValueError, match=r"out_indices=\(0, 4\) must name stages 0..3"):
        build({**config, "out_indices": (0, 4)}, backbone=True)
