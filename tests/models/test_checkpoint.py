"""Official checkpoints load unchanged: today's names, the first publication's, the one-file edition's; strictly."""

import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

import ssm_models
from ssm_models import CheckpointError, from_upstream, load_checkpoint, read_checkpoint
from tests.models.golden import DATA, assert_matches, fill_model, filled, golden, image, manifest


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_names_of_the_first_publication(prefix):
    legacy = json.loads((DATA / "legacy_names.json").read_text())["vssm_tiny_224"]
    model = timm.create_model("vanilla_vmamba_tiny")
    values = filled({name: list(v.shape) for name, v in model.state_dict().items()})
    renamed = {prefix + legacy.get(name, name): value for name, value in values.items()}
    assert prefix + "layers.0.blocks.0.self_attention.A_logs" in renamed
    target = torch.nn.ModuleDict({"backbone": model}) if prefix else model
    target.load_state_dict(renamed, strict=True)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["tiny_onefile_A_v0", "tiny_onefile_B_v05_noz"])
def test_one_file_edition(name):
    record = golden(name)
    model = from_upstream("vmamba", record["config"])
    model.load_state_dict(filled(manifest(name)["keys"]), strict=True)
    logits = model.double().eval()(image(record["input_shape"]).double())
    assert_matches(logits, record["logits"], 1e-11, "logits")


@pytest.mark.parametrize("registered", ["vanilla_vmamba_tiny", "vmamba_tiny_s1l8"])
def test_one_file_edition_of_published_models(registered):
    with torch.device("meta"):
        model = timm.create_model(registered)
        stored = {key: torch.empty(shape) for key, shape in manifest(f"onefile_{registered}")["keys"].items()}
    converted = model.convert_state_dict(stored)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_conversion_leaves_present_names_alone():
    model = timm.create_model("vmamba_nano")
    state = model.state_dict()
    converted = model.convert_state_dict(state)
    assert list(converted) == list(state) and all(converted[k] is v for k, v in state.items())


def test_layouts_share_checkpoints_and_numbers():
    first = timm.create_model("vmamba_nano", norm_layer="ln2d").double().eval()
    last = timm.create_model("vmamba_nano", norm_layer="ln").double().eval()
    fill_model(first)
    last.load_state_dict(first.state_dict(), strict=True)
    x = torch.randn(2, 3, 40, 28, dtype=torch.float64)
    torch.testing.assert_close(last(x), first(x), rtol=1e-12, atol=1e-12)


def test_convolution_shaped_linear_weights_load():
    model = timm.create_model("vmamba_nano", norm_layer="ln")
    state = {
        k: v[:, :, None, None] if k.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) else v
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True)


def test_position_embedding_is_resized_to_the_grid():
    record = json.loads((DATA / "pos_embed.json").read_text())["logits"]
    config = golden("tiny_B_v05_noz_ndw_pos")["config"]
    small, large = (from_upstream("vmamba", config | {"imgsize": size}) for size in (64, 96))
    large.load_state_dict(fill_model(small).state_dict(), strict=True)
    logits = large.eval()(image([2, 3, 96, 96]))
    assert_matches(logits, record, 5e-6, "logits")
    # the same happens at run time, for images of another size than the model's
    torch.testing.assert_close(small(image([2, 3, 96, 96])), logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def nano():
    return fill_model(timm.create_model("vmamba_nano"))


@pytest.mark.parametrize("form", ["plain", "model", "module", "safetensors", "detector", "ema"])
def test_files(form, nano, tmp_path):
    state = nano.state_dict()
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    path, which = tmp_path / "weights.pth", "auto"
    if form == "plain":
        torch.save(state, path)
    elif form == "model":
        torch.save({"model": state, "model_ema": other, "epoch": 3}, path)
    elif form == "module":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif form == "detector":
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()} | {"neck.w": torch.ones(1)}}, path)
    elif form == "ema":
        torch.save({"model": other, "model_ema": state}, path)
        which = "ema"
    else:
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    fresh = timm.create_model("vmamba_nano")
    load_checkpoint(fresh, path, which)
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path):
    trap = tmp_path / "executed"
    torch.save({"model": {}, "config": Payload(trap)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="no code is run from files") as caught:
        read_checkpoint(tmp_path / "bad.pth")
    assert not trap.exists() and "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(Payload(trap))).close()
    assert trap.exists(), "the payload is real"


def test_a_checkpoint_for_another_model_names_the_first_differences(nano, tmp_path):
    save_file(nano.state_dict(), tmp_path / "nano.safetensors")
    other = timm.create_model("vmamba_nano", num_classes=7, depths=(1, 3, 1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(other, tmp_path / "nano.safetensors")
    message = str(caught.value)
    assert "missing layers.1.blocks.2.norm.weight, layers.1.blocks.2.norm.bias, " in message and " more;" in message
    assert "other shapes: classifier.head.weight (10, 128) instead of (7, 128)" in message and "\n" not in message
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_named(content, suffix, tmp_path):
    path = tmp_path / f"torn{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"torn{suffix}") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_entry(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.pth is not a file"):
        read_checkpoint(tmp_path / "nowhere.pth")
    torch.save({"optimizer": {}, "epoch": 1}, tmp_path / "state.pth")
    with pytest.raises(
        CheckpointError, match="has no model or state_dict or model_ema weights; it holds: optimizer, epoch"
    ):
        read_checkpoint(tmp_path / "state.pth")


def test_timm_loads_a_file_through_the_filter(nano, tmp_path):
    state = {k.replace(".op.", ".self_attention."): v for k, v in nano.state_dict().items()}
    save_file(state, tmp_path / "old.safetensors")
    overlay = {"file": str(tmp_path / "old.safetensors"), "num_classes": 10}
    model = timm.create_model("vmamba_nano", pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay)
    assert model.classifier.head.out_features == 4
    got = model.state_dict()
    assert all(torch.equal(got[k], v) for k, v in nano.state_dict().items() if not k.startswith("classifier.head"))


def test_public_names():
    assert set(ssm_models.__all__) <= set(dir(ssm_models))
