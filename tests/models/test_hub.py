"""Weights by timm's own ways: a file, a state dict, a folder in the hub's format, the hub.

`timm.create_model` must do with these models what it does with its own: that needs right default_cfgs and filters.
"""

import json
import shutil

import pytest
import timm
import timm.models._hub as hub
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from yacs.config import CfgNode

from ssm_models import load_checkpoint, read_checkpoint
from ssm_models.vim import checkpoint_filter_fn
from tests.models.golden import fill_model

MODELS = ["vmamba_nano", "vim_nano", "vssd_nano"]
TIMM = tuple(map(int, timm.__version__.split(".")[:3]))

needs_hub = pytest.mark.skipif(not hub.has_hf_hub(), reason="timm finds no huggingface_hub, or one too new for it")
local_dir = pytest.mark.skipif(TIMM < (1, 0, 26), reason="earlier ones take the safetensors of a folder for a pickle")


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def source(name):
    return fill_model(timm.create_model(name, num_classes=4))


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32)


def create(name, num_classes=4, channels=3, **overlay):
    """A model with weights made for 4 classes."""
    overlay = {"num_classes": 4, **overlay}
    model = timm.create_model(
        name, pretrained=True, num_classes=num_classes, in_chans=channels, pretrained_cfg_overlay=overlay
    )
    return model.eval()


def stems_and_stages(model):
    """All weights but the classifier's."""
    head = model.default_cfg["classifier"]
    return {key: value for key, value in model.state_dict().items() if not key.startswith(f"{head}.")}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file(name, source, x, suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    save_file(source.state_dict(), path) if suffix == "safetensors" else torch.save(source.state_dict(), path)
    assert torch.equal(create(name, file=str(path))(x), source(x))

    other = create(name, num_classes=7, file=str(path))
    assert other(x).shape == (2, 7)
    expected = stems_and_stages(source)
    assert all(torch.equal(value, expected[key]) for key, value in stems_and_stages(other).items())

    gray = create(name, channels=1, file=str(path))  # timm sums the first convolution over the channels
    torch.testing.assert_close(gray(x[:, :1]), source(x[:, :1].expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_features_of_a_file(name, source, x, tmp_path):
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"num_classes": 4, "file": str(tmp_path / "weights.safetensors")}
    net = timm.create_model(
        name, pretrained=True, num_classes=10, features_only=True, out_indices=(0, 2), pretrained_cfg_overlay=overlay
    )
    maps = net.eval()(x)
    expected = source.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [32 // m.shape[2] for m in maps] == net.feature_info.reduction()
    assert all(torch.equal(got, want) for got, want in zip(maps, expected, strict=True))


def test_an_official_training_checkpoint(name, source, x, tmp_path):
    """timm refuses a file with a config in it, or runs what it says (before 1.0.26); it takes what we read from one."""
    path = tmp_path / "ckpt_epoch_264.pth"
    torch.save({"model": source.state_dict(), "config": CfgNode({"A": 1})}, path)
    assert torch.equal(create(name, state_dict=read_checkpoint(path))(x), source(x))
    assert create(name, num_classes=7, state_dict=read_checkpoint(path))(x).shape == (2, 7)


@pytest.fixture
def folder(source, tmp_path):
    save_for_hf(source, tmp_path / "mine", safe_serialization=True)
    return tmp_path / "mine"


@needs_hub
def test_the_format_of_the_hub(name, source, folder, x):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == (name, 4, source.num_features)
    assert config["pretrained_cfg"]["classifier"] == source.default_cfg["classifier"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"]).eval()
    assert load_checkpoint(model, folder / "model.safetensors")[1:] == ("", (), (), (), ())
    assert torch.equal(model(x), source(x))


@needs_hub
@local_dir
def test_a_folder(name, source, folder, x):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(model(x), source(x))
    assert resolve_model_data_config(model)["crop_pct"] == source.default_cfg["crop_pct"]
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert other(x).shape == (2, 7)
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()(x)
    expected = source.forward_intermediates(x, intermediates_only=True)[-len(maps) :]
    assert all(torch.equal(got, want) for got, want in zip(maps, expected, strict=True))


@needs_hub
@local_dir
@pytest.mark.parametrize("pool", ["max", "avgmax", "catavgmax", ""])
def test_a_folder_keeps_the_pooling(name, source, x, pool, tmp_path):
    source.reset_classifier(3, pool)
    save_for_hf(source, tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert model.global_pool == pool and torch.equal(model(x), source(x))


@needs_hub
@local_dir
@pytest.mark.skipif(not hasattr(timm.models, "get_model_args"), reason="earlier ones store no arguments of the model")
@pytest.mark.parametrize(
    "kwargs", [{}, {"if_rope": True, "cls_mode": "double"}, {"if_abs_pos_embed": False, "if_rope": True}]
)
@pytest.mark.parametrize("size", [(16, 48), (64, 24), (32, 32)])
def test_rectangular_images_of_another_size(size, kwargs, tmp_path):
    """Of 48x16 pixels: 12x4 patches, which 4x12 and no square grid have, too."""
    source = fill_model(timm.create_model("vim_nano", img_size=(48, 16), num_classes=4, **kwargs))
    save_for_hf(source, tmp_path, safe_serialization=True)
    x = torch.randn(1, 3, *size)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size).eval()
    assert model.grid == (size[0] // 4, size[1] // 4)
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)  # which resizes as it runs

    shell = timm.create_model("vim_nano", img_size=size, num_classes=4, device="meta", **kwargs)
    shell.pretrained_model_args = {"img_size": (48, 16)}
    shell.load_state_dict(checkpoint_filter_fn(source.state_dict(), shell), assign=True)
    assert torch.equal(shell.eval()(x), model(x))

    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(own, strict=True)  # is of this size, whatever is known of the source
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


@needs_hub
def test_the_hub(name, source, folder, x, monkeypatch):
    """Download and all that follows, with a folder for the server."""
    asked = []

    def download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return shutil.copy(folder / filename, folder.parent)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = timm.create_model("hf-hub:someone/mine", pretrained=True).eval()
    assert torch.equal(model(x), source(x))
    assert asked == [("someone/mine", "config.json"), ("someone/mine", "model.safetensors")]
