"""analyze/hub.py: the folder that timm and a hub read, and what its card says."""

import argparse
import errno
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config, resolve_model_data_config

from analyze import hub, inputs, quick
from analyze.impl import hub as work
from analyze.impl.hub_card import card_text
from ssm_models.model_card import model_card
from ssm_models.vssd import VSSD
from ssm_train.config.defaults import default_config, replaced
from ssm_train.data.transforms import eval_transform
from ssm_train.record.checkpoint import Checkpoint


def picture(channels: int = 3, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """Noise that every way to resize changes."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def python_of(card: str) -> list[str]:
    """The card's code blocks."""
    return [part.partition("```")[0] for part in card.split("```python\n")[1:]]


@pytest.fixture(scope="module")
def folder(quickstart, tmp_path_factory) -> Path:
    """Of the quickstart's run."""
    out = tmp_path_factory.mktemp("hub") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(quickstart)
        assert hub.main(["--checkpoint", str(quick.QUICKSTART), "--license", "mit", "--out", str(out)]) == 0
    return out


def test_the_model_of_a_run(folder, quickstart):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    run = quickstart / quick.QUICKSTART
    expected = inputs.load_model("vmamba_nano", run)
    # both prepare the picture by themselves
    x = create_transform(**resolve_model_data_config(model))(picture())[None]
    assert torch.equal(x[0], inputs.evaluation_transform("vmamba_nano", run)(picture()))
    with torch.no_grad():
        assert model(x).shape == (1, 10) and torch.equal(model(x), expected(x))
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list("0123456789") and config["num_classes"] == 10
    assert "num_classes" not in config["model_args"]  # transformers would give it twice


def test_the_card_of_a_run(folder, quickstart):
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "timm", "image-classification")
    assert "vmamba" in data.tags and data.datasets is None
    metrics = json.loads((quickstart / quick.QUICKSTART / "metrics.json").read_text())
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found == {"top-1 accuracy": metrics["top1"], "top-5 accuracy": metrics["top5"]}
    assert {(r.dataset_name, r.dataset_type, r.source_url) for r in data.eval_results} == {
        ("digits", "imagefolder", None)
    }
    text = (folder / "README.md").read_text()
    assert f"| digits | {metrics['top1']:.2f} | {metrics['top5']:.2f} | 355 validation images" in text
    assert "- **Parameters:** 379,786\n" in text and "RGB, resized to 32 x 32 pixels (bicubic)" in text
    assert "@misc{vmamba2024,\n" in text and "arxiv.org/abs/2401.10166" in text


def test_the_code_of_the_card_runs(folder, quickstart, monkeypatch, capsys):
    code, with_transformers = python_of((folder / "README.md").read_text())
    monkeypatch.chdir(folder.parent)
    picture().save("image.png")
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    run = quickstart / quick.QUICKSTART
    x = inputs.evaluation_transform("vmamba_nano", run)(picture())[None]
    with torch.no_grad():
        probabilities = inputs.load_model("vmamba_nano", run)(x).softmax(-1)[0]
    assert len(lines) == 5 and lines[0] == f"{probabilities.max():7.2%} {probabilities.argmax()}"
    assert 'pipeline("image-classification", model="digits")' in with_transformers


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("vmamba_nano", {"ssm_d_state": 2}),
        ("vmamba_nano", {"in_chans": 1, "global_pool": "max"}),
        ("vim_nano", {"if_rope": True, "cls_mode": "double"}),
        ("vssd_nano", {"depths": [1, 1, 2]}),
        ("vssd_nano_iccv2025", {"drop_path_rate": 0.1}),
    ],
)
def test_arguments_of_the_model_come_back(name, arguments, tmp_path):
    model = timm.create_model(name, num_classes=3, **arguments).eval()
    work.save_model(model, tmp_path, ["ant", "bee", "cat"], {})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, model.in_chans, 48, 32)
    with torch.no_grad():
        assert again(x).shape == (2, 3) and torch.equal(again(x), model(x))
    assert again.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    "values",
    [
        {"DATA.IMG_SIZE": 32},
        {"DATA.IMG_SIZE": 64, "DATA.CROP_RATIO": 0.9},
        {"DATA.IMG_SIZE": 64, "DATA.CROP_RATIO": 1.0, "DATA.INTERPOLATION": "bilinear"},
        {},
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_preprocessing_is_that_of_the_run(values, channels):
    cfg = default_config()
    cfg.MODEL.KWARGS.in_chans = channels
    cfg = replaced(cfg, values)
    timms = create_transform(**resolve_data_config(work.preprocessing(cfg)))
    assert torch.equal(timms(picture(channels)), eval_transform(cfg)(picture(channels)))


def test_results_are_those_of_the_weights(quickstart):
    """Of the set that is taken; none where the checkpoint lies inside an epoch."""
    record = {"top1": 50.0, "top5": 90.0, "loss": 1.0, "images": 7, "epoch": 2}
    results = {"best": record, "last": record, "best_ema": record | {"top1": 60.0}, "last_ema": record | {"epoch": 3}}
    meta = {"epoch": 2, "update": 0, "results": results, "weights": "model_ema"}
    checkpoint = Checkpoint(Path("x"), meta, ("model.safetensors", "model_ema.safetensors"))
    cfg = replaced(default_config(), {"DATA.DATA_PATH": "/home/me/my|cats"})
    found = work.result_of_run(checkpoint, "auto", cfg)
    assert (found.metrics["top1"], found.data, found.measured[:12]) == (60.0, "my-cats", "7 validation")
    assert work.result_of_run(checkpoint, "model", cfg).metrics["top1"] == 50.0
    meta["epoch"] = 1
    assert work.result_of_run(checkpoint, "auto", cfg) is None
    meta |= {"epoch": 2, "update": 40}
    assert work.result_of_run(checkpoint, "auto", cfg) is None


def test_a_file_without_a_run_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("vim_nano", num_classes=3).state_dict(), "mine.safetensors")
    Path("names.txt").write_text("ant\nbee\ncat\n")
    arguments = ["--model", "vim_nano", "--checkpoint", "mine.safetensors", "--classes", "names.txt"]
    assert hub.main([*arguments, "--repo", "me/insects", "--out", "out"]) == 0
    card = ModelCard.load("out/README.md")
    assert card.data.eval_results is None and card.data.license == "unknown"
    assert "## Results\n\nNot measured.\n" in card.text and "`mine.safetensors`" in card.text
    assert '"hf-hub:me/insects"' in card.text and 'model="me/insects"' in card.text and "# insects\n" in card.text
    assert json.loads(Path("out/config.json").read_text())["label_names"] == ["ant", "bee", "cat"]


def test_published_weights_have_their_authors_numbers():
    args = argparse.Namespace(out=Path("x"), repo=None, license=None, checkpoint=Path("vssd_tiny.mesa_in1k"))
    args.which = "auto"
    card, data_config = work.describe(args, "vssd_tiny")
    settings = resolve_data_config(data_config, pretrained_cfg=timm.get_pretrained_cfg("vssd_tiny").to_dict())
    text = card_text(card, VSSD, model_card("vssd_nano", 32), settings, 1000)
    head = yaml.safe_load(text.split("---\n")[1])
    [result] = head["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [84.1]
    assert (head["license"], head["datasets"]) == ("unknown", ["imagenet-1k"])
    assert result["source"] == {"name": "the authors", "url": "https://github.com/YuHengsss/VSSD"}
    assert "published by the authors, not measured here" in text and "not stated; without one nobody else" in text
    assert "shorter side resized to 256 pixels, centre of 224 x 224 cut out (bicubic)" in text
    args.which = "model"  # another set than the one that was measured
    assert work.describe(args, "vssd_tiny")[0].result is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "vim_nano"], "--model vim_nano alone has random weights: give --checkpoint as well"),
        (["--checkpoint", "vssd_tiny.in1k", "--license", "mit"], "the weights vssd_tiny.in1k have that of their auth"),
        (["--checkpoint", "x.pth", "--model", "resnet18"], "resnet18 is no model of this repository"),
        (["--checkpoint", "vssd_tiny.in1k", "--repo", "digits"], "--repo digits is not of the form USER/NAME"),
        (["--checkpoint", "vssd_tiny.in1k", "--out", "full"], "--out full exists and is not an empty folder"),
    ],
)
def test_what_is_refused_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert hub.main(["--out", "new", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/mine"]


def test_a_failure_leaves_no_folder(quickstart, tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.chdir(quickstart)
    monkeypatch.setattr(work, "write_synced", full)
    assert hub.main(["--checkpoint", str(quick.QUICKSTART), "--out", str(tmp_path / "out")]) == 2
    assert "no room left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
