"""`pretrained=True` and names in place of paths: the right set of weights, through timm's own machinery."""

import io

import pytest
import timm
import torch

from ssm_models import CheckpointError, DenseBackbone, load_checkpoint, read_checkpoint
from ssm_models.weights import fetch

CASES = {"vmamba_nano": ("model", 0), "vim_nano": ("model", 0), "vssd_nano": ("ema", 1)}


@pytest.mark.parametrize("model", CASES)
def test_create_model(publish, contents, model):
    """The set that the table names, all of it, and nothing of the file kept."""
    which, _ = CASES[model]
    entry = publish(model, entry=which)
    made = timm.create_model(model, pretrained=True, pretrained_cfg_overlay={"url": entry.url}).eval()
    own = made.state_dict()
    theirs = contents[model][{"model": "model", "ema": "model_ema"}[which]]
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert "state_dict" not in made.pretrained_cfg
    by_hand = timm.create_model(model).eval()
    load_checkpoint(by_hand, fetch(entry), which=which)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(made(x), by_hand(x))


@pytest.mark.parametrize("model", CASES)
def test_other_classes_channels_and_maps(publish, contents, model):
    entry = publish(model)
    overlay = {"url": entry.url}
    made = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1)
    own = made.state_dict()
    stem = f"{made.pretrained_cfg['first_conv']}.weight"
    theirs = contents[model]["model"]
    original = theirs[stem]
    assert torch.allclose(own[stem], original.sum(1, keepdim=True))
    head = made.pretrained_cfg["classifier"]
    kept = [name for name in own if not name.startswith(f"{head}.") and name != stem]
    assert all(torch.equal(own[name], theirs[name]) for name in kept)
    assert own[f"{head}.weight"].shape[0] == 7

    maps = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    name = next(name for name in maps.state_dict() if name.endswith(stem))
    assert torch.equal(maps.state_dict()[name], original)


def test_a_file_of_another_model(publish, files):
    entry = publish("vmamba_nano", content=files["vssd_nano"])
    for classes in (10, 7):  # with other classes timm itself would load what fits, and say nothing
        with pytest.raises(CheckpointError, match="vmamba_nano.test does not fit this VSSM: missing"):
            timm.create_model(
                "vmamba_nano", pretrained=True, pretrained_cfg_overlay={"url": entry.url}, num_classes=classes
            )


def test_a_users_own_source_stays_timms(publish, tmp_path):
    publish("vmamba_nano")
    model = timm.create_model("vmamba_nano")
    timm.models.save_for_hf(model, tmp_path / "mine", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    assert torch.equal(again.state_dict()["classifier.head.weight"], model.state_dict()["classifier.head.weight"])


def test_a_users_own_model_claims_nobodys_licence(publish):
    own = timm.create_model("vmamba_tiny_s1l8", num_classes=3, depths=(1, 1, 1, 1), dims=8)
    assert not own.pretrained_cfg.get("license") and not own.pretrained_cfg.get("origin_url")
    entry = publish("vmamba_nano")
    theirs = timm.create_model("vmamba_nano", pretrained=True, pretrained_cfg_overlay={"url": entry.url})
    assert (theirs.pretrained_cfg["license"], theirs.pretrained_cfg["origin_url"]) == (entry.licence, entry.source)


def test_names_in_place_of_paths(publish, contents):
    publish("vssd_nano", entry="ema")
    name = "patch_embed.conv1.conv.weight"
    expected = contents["vssd_nano"]["model_ema"][name]
    assert torch.equal(read_checkpoint("vssd_nano.test")[name], expected)
    assert torch.equal(read_checkpoint("vssd_nano", which="model")[name], contents["vssd_nano"]["model"][name])
    model = timm.create_model("vssd_nano")
    assert load_checkpoint(model, "vssd_nano.test").entry == "model_ema"
    assert torch.equal(model.state_dict()[name], expected)
    backbone = DenseBackbone("vssd_nano", checkpoint="vssd_nano.test")
    assert torch.equal(backbone.state_dict()[name], expected)


class Canary:
    def __reduce__(self):
        return print, ("executed",)


def test_a_malicious_file_does_not_run(publish, capsys):
    file = io.BytesIO()
    torch.save({"model": timm.create_model("vmamba_nano").state_dict(), "config": Canary()}, file)
    entry = publish("vmamba_nano", content=file.getvalue())
    with pytest.raises(CheckpointError):
        timm.create_model("vmamba_nano", pretrained=True, pretrained_cfg_overlay={"url": entry.url})
    assert "executed" not in capsys.readouterr().out


def test_a_file_of_the_users(contents, files, tmp_path, capsys):
    """What authors write: with pickled settings, which timm refuses or, in older versions, executes."""
    (tmp_path / "own.pth").write_bytes(files["vssd_nano"])
    overlay = {"file": str(tmp_path / "own.pth")}
    model = timm.create_model("vssd_nano", pretrained=True, pretrained_cfg_overlay=overlay)
    expected = contents["vssd_nano"]["model"]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.pretrained_cfg.get("license") and "state_dict" not in model.pretrained_cfg
    fewer = timm.create_model("vssd_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert fewer.head.weight.shape[0] == 3
    torch.save({"model": expected, "config": Canary()}, tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        timm.create_model("vssd_nano", pretrained=True, pretrained_cfg_overlay=overlay)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="does not fit this VSSM"):
        (tmp_path / "own.pth").write_bytes(files["vssd_nano"])
        timm.create_model("vmamba_nano", pretrained=True, pretrained_cfg_overlay=overlay)
