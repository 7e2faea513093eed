"""Official checkpoints load unchanged: today's names, the first publication's, the one-file edition's; strictly."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import ssm_models
from ssm_models import (
    CheckpointError,
    DenseVisionMamba,
    DenseVSSD,
    DenseVSSM,
    from_upstream,
    load_checkpoint,
    read_checkpoint,
)
from ssm_models.vim import VARIANTS as VIM
from ssm_models.vssd import VARIANTS as VSSD
from ssm_models.vssm import VARIANTS as VSSM
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
    report = load_checkpoint(fresh, path, which)
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())
    entries = {"model": "model", "module": "state_dict", "detector": "state_dict", "ema": "model_ema"}
    beside = ("neck.w",) if form == "detector" else ()
    assert (report.entry, report.fresh, report.left_out) == (entries.get(form, ""), (), beside)


def test_a_checkpoint_for_another_model_names_the_first_differences(nano, tmp_path):
    save_file(nano.state_dict(), tmp_path / "nano.safetensors")
    other = timm.create_model("vmamba_nano", num_classes=7, depths=(1, 3, 1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(other, tmp_path / "nano.safetensors")
    message = str(caught.value)
    assert "missing layers.1.blocks.2.norm.weight, layers.1.blocks.2.norm.bias, " in message and " more;" in message
    assert "other shapes: classifier.head.weight (10, 128) instead of (7, 128)" in message and "\n" not in message
    assert "new_head" not in message, "which would not help"
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_another_number_of_classes_must_be_asked_for(nano, tmp_path):
    path = tmp_path / "nano.safetensors"
    save_file(nano.state_dict(), path)
    head = ("classifier.head.weight", "classifier.head.bias")
    model = timm.create_model("vmamba_nano", num_classes=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="new_head=True keeps the model's own classifier") as caught:
        load_checkpoint(model, path)
    assert "classifier.head.bias (10,) instead of (7,)" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    report = load_checkpoint(model, path, new_head=True)
    assert set(report.fresh) == set(report.left_out) == set(head) and "stayed as they were: classifier.head" in str(
        report
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in head else nano.state_dict()[name]), name
    same_size = timm.create_model("vmamba_nano")
    own = same_size.classifier.head.weight.clone()
    load_checkpoint(same_size, path, new_head=True)
    assert torch.equal(same_size.classifier.head.weight, own)
    report = load_checkpoint(timm.create_model("vmamba_nano", num_classes=0), path, new_head=True)
    assert report.fresh == () and set(report.left_out) == set(head)
    with pytest.raises(CheckpointError, match="missing layers.1.blocks.2"):
        load_checkpoint(timm.create_model("vmamba_nano", depths=(1, 3, 1)), path, new_head=True)
    with pytest.raises(ValueError, match="needs a model with a classifier, not a Linear"):
        load_checkpoint(torch.nn.Linear(1, 1), path, new_head=True)


BACKBONES = {
    "vmamba_nano": (
        lambda: DenseVSSM(**VSSM["vmamba_nano"] | {"norm_layer": "ln"}, out_indices=(0, 2)),
        ["outnorm0.weight", "outnorm0.bias", "outnorm2.weight", "outnorm2.bias"],
        ["classifier.norm.weight", "classifier.norm.bias", "classifier.head.weight", "classifier.head.bias"],
    ),
    "vssd_nano": (
        lambda: DenseVSSD(**VSSD["vssd_nano"], out_indices=(2,)),
        ["outnorm2.weight", "outnorm2.bias"],
        ["norm.weight", "norm.bias", "head.weight", "head.bias"],
    ),
    "vim_nano": (
        lambda: DenseVisionMamba(**VIM["vim_nano"] | {"stride": 16, "patch_size": 16}, out_indices=(5,)),
        [*(f"fpn1.{i}.{leaf}" for i in (0, 1, 3) for leaf in ("weight", "bias")), "fpn2.0.weight", "fpn2.0.bias"]
        + [f"fpn1.1.{leaf}" for leaf in ("running_mean", "running_var", "num_batches_tracked")],
        ["cls_token", "norm_f.weight", "head.weight", "head.bias"],
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_take_classifiers_and_detectors(name, tmp_path):
    make, own, of_classifier = BACKBONES[name]
    patches = {"stride": 16, "patch_size": 16} if name == "vim_nano" else {}
    classifier = fill_model(timm.create_model(name, num_classes=7, **patches))
    backbone = make()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    report = load_checkpoint(backbone, tmp_path / "classifier.pth")
    assert set(report.fresh) == set(own) and set(report.left_out) == set(of_classifier)
    for key, value in backbone.state_dict().items():
        if key == "pos_embed":  # a row less, that of the class token
            theirs = classifier.state_dict()[key]
            expected = torch.cat([theirs[:, : value.shape[1] // 2], theirs[:, value.shape[1] // 2 + 1 :]], 1)
        else:
            expected = before[key] if key in own else classifier.state_dict()[key]
        assert torch.equal(value, expected), key

    detector = {f"backbone.{key}": value + 1 for key, value in backbone.state_dict().items()}
    torch.save({"meta": {}, "state_dict": {**detector, "neck.w": torch.ones(1)}}, tmp_path / "detector.pth")
    again = make()
    report = load_checkpoint(again, tmp_path / "detector.pth")
    assert report[1:] == ("state_dict", ("state_dict",), (), ("neck.w",), ())
    assert all(torch.equal(value, detector[f"backbone.{key}"]) for key, value in again.state_dict().items())

    lacking = {key: value for key, value in detector.items() if key != f"backbone.{own[0]}"}
    torch.save({"state_dict": lacking}, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match=f"does not fit this Dense.*: missing {own[0]}$"):
        load_checkpoint(make(), tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match="needs a model with a classifier, not a Dense"):
        load_checkpoint(make(), tmp_path / "classifier.pth", new_head=True)


def test_old_names_load_into_a_backbone(tmp_path):
    names = json.loads((DATA / "legacy_names.json").read_text())["vssm_tiny_224"]
    assert names["classifier.norm.weight"] == "norm.weight" and names["classifier.head.bias"] == "head.bias"
    small = {"depths": (1, 1), "dims": 8}
    state = fill_model(timm.create_model("vanilla_vmamba_tiny", **small)).state_dict()
    torch.save({"model": {names.get(name, name): value for name, value in state.items()}}, tmp_path / "old.pth")
    backbone = DenseVSSM(**VSSM["vanilla_vmamba_tiny"] | small, out_indices=(0, 1))
    report = load_checkpoint(backbone, tmp_path / "old.pth")
    assert {"classifier.norm.weight", "classifier.head.bias"} < set(report.left_out)
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items() if k not in report.fresh)


@pytest.mark.parametrize("second", ["module.classifier.head.bias", "head.bias"])
def test_weights_that_are_there_twice(second, nano, tmp_path):
    torch.save({**nano.state_dict(), second: torch.zeros(10)}, tmp_path / "twice.pth")
    with pytest.raises(CheckpointError, match="twice.pth has weights twice"):
        load_checkpoint(nano, tmp_path / "twice.pth")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("value", [3, "text", torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=type)
def test_weights_that_are_no_ordinary_tensors(value, nano, tmp_path):
    torch.save({"model": {**nano.state_dict(), "patch_embed.0.bias": value}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="among its weights 'patch_embed.0.bias', which is no ordinary tensor"):
        load_checkpoint(nano, tmp_path / "odd.pth")


def test_a_position_embedding_that_is_none_is_an_error_of_ours(tmp_path):
    model = timm.create_model("vim_nano")
    save_file({**model.state_dict(), "pos_embed": torch.zeros(1, 7, 64)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this VisionMamba: pos_embed"):
        load_checkpoint(model, tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    "header", [b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}', b"[]", b'{"x":1}', b'{"__class__":"os"}']
)
@pytest.mark.parametrize("length", [None, 2**40, 2**63])
def test_broken_headers_of_safetensors(header, length, tmp_path):
    size = len(header) if length is None else length
    (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match="x.safetensors is not a valid safetensors file: "):
        read_checkpoint(tmp_path / "x.safetensors")


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
    for content in ({"a": torch.ones(1)}, {"model": {"a": torch.ones(1)}}):
        torch.save(content, tmp_path / "plain.pth")
        with pytest.raises(CheckpointError, match="plain.pth has no model_ema weights; it holds: (a|model)$"):
            read_checkpoint(tmp_path / "plain.pth", "ema")
    with pytest.raises(ValueError, match="which='best' is not one of auto, model, ema"):
        read_checkpoint(tmp_path / "plain.pth", "best")


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


def test_what_wrappers_put_before_names(nano, tmp_path):
    """torch.compile, DDP and AveragedModel, in any order, as `state_dict` of the wrapped model gives them."""
    state = nano.state_dict()
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(nano))
    torch.save(averaged.state_dict(), tmp_path / "averaged.pth")
    assert "n_averaged" in averaged.state_dict() and "module._orig_mod.patch_embed.0.weight" in averaged.state_dict()
    torch.save({"model": {f"_orig_mod.module.{name}": value for name, value in state.items()}}, tmp_path / "b.pth")
    for file in ("averaged.pth", "b.pth"):
        fresh = timm.create_model("vmamba_nano")
        load_checkpoint(fresh, tmp_path / file)
        assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    torch.save({"module.a": torch.ones(1), "_orig_mod.a": torch.ones(1)}, tmp_path / "twice.pth")
    with pytest.raises(CheckpointError, match="has weights twice"):
        load_checkpoint(nano, tmp_path / "twice.pth")
