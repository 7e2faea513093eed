"""VMamba against recorded numbers of the official implementation: logits, maps, gradient norms; keys and counts."""

import json

import numpy as np
import pytest
import timm
import torch

import ssm_models  # noqa: F401  (registers the models)
from ssm_models import from_upstream
from ssm_models.layers.ss2d import SS2D
from ssm_models.layers.ss2d_m0 import SS2DM0
from ssm_models.layers.stem import PatchMerging
from tests.models.golden import DATA, assert_matches, fill_model, filled, golden, goldens, image, manifest, probe

FULL_SIZE = [name for name in goldens() if name.endswith("_224")]
TINY = [name for name in goldens() if name not in FULL_SIZE and "onefile" not in name]
XV_AND_M0 = [name for name in TINY if "_xv" in name or "_m0" in name]

PUBLISHED = {  # registry name: (manifest, parameters)
    "vanilla_vmamba_tiny": ("vssm_tiny_224", 22_893_448),
    "vanilla_vmamba_small": ("vssm_small_224", 44_417_416),
    "vanilla_vmamba_base": ("vssm_base_224", 76_254_056),
    "vmamba_tiny_s2l5": ("vmambav2_tiny_224", 30_705_832),
    "vmamba_small_s2l15": ("vmambav2_small_224", 50_147_752),
    "vmamba_base_s2l15": ("vmambav2_base_224", 88_557_800),
    "vmamba_tiny_s1l8": ("vmambav2v_tiny_224", 30_249_064),
    "vmamba_small_s1l20": ("vmambav2v_small_224", 49_012_840),
    "vmamba_base_s1l20": ("vmambav2v_base_224", 86_614_504),
}

M2 = {  # registry name: (parameters, tensors)
    "vmamba_tiny_m2": (25_340_296, 194),
    "vmamba_small_m2": (39_079_816, 330),
    "vmamba_base_m2": (67_527_528, 330),
}


def check(model, record, dtype, tolerance, gradient_tolerance, skip=()):
    """Run forward and backward with hooks on the recorded stages and compare everything that was recorded."""
    model = fill_model(model).to(dtype)
    seen = {}
    for name in record["stages"]:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    x = image(record["input_shape"]).to(dtype).requires_grad_()
    y = model(x)
    if "logits" in record:
        rms = record["logits"]["l2"] / np.sqrt(np.prod(record["logits"]["shape"]))
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

    loss.backward()
    parameters = dict(model.named_parameters())
    assert set(record["grad_l2"]) == set(parameters)
    for name, norm in record["grad_l2"].items():
        if name not in skip:
            assert float(parameters[name].grad.double().norm()) == pytest.approx(norm, rel=gradient_tolerance), name
    for name, value in record["grad_probe"].items():
        if name not in skip:
            assert abs(probe(parameters[name].grad) - value) <= gradient_tolerance * record["grad_l2"][name], name
    assert float(x.grad.double().norm()) == pytest.approx(record["grad_input_l2"], rel=gradient_tolerance)


@pytest.mark.parametrize("name", TINY)
def test_float64(name):
    record = golden(name)
    model = from_upstream("vmamba", record["config"], backbone="backbone" in name)
    check(model, record, torch.float64, 1e-11, 1e-10)


@pytest.mark.parametrize("name", ["tiny_A_v0", "tiny_B_v05_noz", "tiny_B_v05_noz_ln", "tiny_B_v052dc", *XV_AND_M0])
def test_float32(name):
    record = golden(name)
    tolerance = max(5e-6, 5 * record["noise"])
    check(from_upstream("vmamba", record["config"]), record, torch.float32, tolerance, 1e-3, skip=record["noisy"])


@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_models_at_full_size(name):
    record = golden(name)
    tolerance = max(5e-6, 5 * record["noise"])
    if name.startswith("backbone"):
        model = from_upstream("vmamba", record["config"], backbone=True)
    else:
        model = timm.create_model(next(registry for registry, (stored, _) in PUBLISHED.items() if stored == name))
    check(model, record, torch.float32, tolerance, 1e-3, skip=record["noisy"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_counts_of_published_models(name):
    stored, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = timm.create_model(name)
        twin = from_upstream("vmamba", manifest(stored)["config"])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(shapes.items()) == list(manifest(stored)["keys"].items())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {key: list(value.shape) for key, value in twin.state_dict().items()} == shapes


@pytest.mark.parametrize("name", M2)
def test_counts_of_m2_models(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == M2[name]


MANIFESTS = sorted(path.stem for path in (DATA / "keys").glob("*.json"))


@pytest.mark.parametrize("name", [n for n in MANIFESTS if n.startswith(("tiny", "backbone")) and "onefile" not in n])
def test_keys_of_variants(name):
    with torch.device("meta"):
        model = from_upstream("vmamba", manifest(name)["config"], backbone="backbone" in name)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    keys = manifest(name)["keys"]
    if "hist_v" in name:  # of a time when parameters were created in another order
        shapes, keys = dict(sorted(shapes.items())), dict(sorted(keys.items()))
    assert list(shapes.items()) == list(keys.items())


VARIANTS_THAT_ARE_NOTED = [  # changes of tiny_B_v05_noz; mean, L2 norm and probe of its logits
    ({"norm_layer": "bn", "forward_type": "v05_onsigmoid_noz"}, 0.268681704942137, 19.949202679832943, -23.028862824),
    ({"patch_norm": False, "norm_layer": "ln"}, 0.009352119215764105, 8.117143833819163, 5.686032321205),
    ({"patch_norm": False, "norm_layer": "ln", "patchembed_version": "v1"}, -0.00212409264, 7.9924297979, 10.09739993),
]


@pytest.mark.parametrize("change, mean, norm, noise", VARIANTS_THAT_ARE_NOTED)
def test_variants_of_which_float32_logits_were_noted(change, mean, norm, noise):
    model = fill_model(from_upstream("vmamba", golden("tiny_B_v05_noz")["config"] | change))
    with torch.no_grad():
        y = model(image([2, 3, 64, 64]))
    assert y.shape == (2, 100) and float(y.mean()) == pytest.approx(mean, abs=2e-6)
    assert float(y.norm()) == pytest.approx(norm, rel=5e-6) and probe(y) == pytest.approx(noise, abs=5e-6 * norm)


MIXERS = json.loads((DATA.parent / "ops" / "mixers_vmamba.json").read_text())
MIXER_OUTPUTS = np.load(DATA.parent / "ops" / "mixers_vmamba.npz")


def drawn(description: str) -> torch.Tensor:
    """'PCG64(4321).standard_normal([2, 5, 7, 8]) float32' -> that tensor, in float64"""
    seed, shape = description.removeprefix("PCG64(").split(").standard_normal(")
    shape = json.loads(shape.split(")")[0])
    return torch.from_numpy(
        np.random.Generator(np.random.PCG64(int(seed))).standard_normal(shape).astype("f4")
    ).double()


def check_module(module, name, keys, dy):
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == keys
    module.load_state_dict(filled(keys))
    x = drawn(MIXERS[name]["x"]).requires_grad_()
    y = module.double().eval()(x)
    y.backward(drawn(dy))
    for got, part in ((y, "y"), (x.grad, "dx")):
        np.testing.assert_allclose(got.detach().numpy(), MIXER_OUTPUTS[f"{name}/{part}"], rtol=1e-6, atol=1e-6)
    for key, norm in MIXERS[name]["grad_l2"].items():
        assert float(module.get_parameter(key).grad.norm()) == pytest.approx(norm, rel=1e-9), key


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", [name for name in sorted(MIXERS) if name[0] == "v"])
def test_mixer(name, impl):
    case = MIXERS[name]
    module = SS2D(**case["kwargs"], forward_type=case["forward_type"], channel_first=case["channel_first"], impl=impl)
    check_module(module, name, case["keys"], case["dy"])


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_m0_mixer(impl):
    case = MIXERS["m0_noz_cl"]
    check_module(SS2DM0(**case["kwargs"], act_layer="gelu", impl=impl), "m0_noz_cl", case["keys"], case["dy"])


@pytest.mark.parametrize("name", [name for name in sorted(MIXERS) if name.startswith("PatchMerging")])
def test_patch_merging(name):
    module = PatchMerging(6, 10, "ln2d" if name.endswith("cf") else "ln")
    check_module(module, name, MIXERS[name]["keys"], MIXERS[name]["dy"])
