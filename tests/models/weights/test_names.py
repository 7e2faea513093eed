"""Names of published weights in place of paths, in every part of the repository that takes weights."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from analyze import get_ckpt, inputs
from ssm_train.cli import main
from ssm_train.common.errors import UserError
from ssm_train.data.digits import main as digits_main
from ssm_train.step.pretrained import Pretrained, load_pretrained

ROOT = Path(__file__).parents[3]
NAME = Path("vssd_nano.test")


def test_the_trainer(publish, contents):
    """`main.py --pretrained NAME` takes the set of weights that the table names."""
    publish("vssd_nano", entry="ema")
    model = timm.create_model("vssd_nano")
    load_pretrained(model, Pretrained(NAME))
    expected = contents["vssd_nano"]["model_ema"]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="vssd_nanno.test is neither a file nor the name of published weights"):
        load_pretrained(model, Pretrained(Path("vssd_nanno.test")))


def test_the_analyses(publish, contents):
    """`--checkpoint NAME`, with which a model need not be named."""
    publish("vssd_nano", entry="ema")
    assert inputs.model_name(None, NAME) == "vssd_nano"
    expected = contents["vssd_nano"]["model_ema"]
    found = inputs.load_model("vssd_nano", NAME).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.dense
def test_detectors_and_segmentors(publish, contents):
    """What the tools read as a checkpoint."""
    pytest.importorskip("mmengine")
    from ssm_mm import checkpoints

    publish("vmamba_nano")
    name = "patch_embed.0.weight"
    assert torch.equal(checkpoints.read("vmamba_nano.test")["model"][name], contents["vmamba_nano"]["model"][name])


def test_the_trainer_evaluates_as_published(publish, tmp_path, capsys):
    """Size, interpolation and crop of the table's model in place of the config's; what --opts says stays."""
    publish("vssd_nano", entry="ema")
    folder = tmp_path / "data"
    assert digits_main(["--out", str(folder)]) == 0
    config = ["--cfg", str(ROOT / "configs/classification/vssd/vssd_nano_digits.yaml"), "--data-path", str(folder)]
    (tmp_path / "other.yaml").write_text(f"BASE: {config[1]}\nDATA: {{IMG_SIZE: 40, CROP_RATIO: 1.0}}\n")
    config[1] = str(tmp_path / "other.yaml")
    evaluation = ["--eval", "--pretrained", str(NAME), "--output", str(tmp_path / "out")]
    assert main([*config, *evaluation, "--opts", "DATA.INTERPOLATION", "bilinear"]) == 0
    out = capsys.readouterr().out
    assert "DATA.IMG_SIZE is 32, as published for vssd_nano.test, in place of the config's 40" in out
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (found["image_size"], found["interpolation"]) == (32, "bilinear")
    assert found["pretrained"]["name"] == "vssd_nano.test" and found["pretrained"]["entry"] == "model_ema"
    assert set(found["results"]) == {"model", "model_ema"}


def test_names_of_other_tasks(tmp_path):
    name = Path("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco")
    with pytest.raises(UserError, match="--checkpoint .* no classifier of this repository"):
        inputs.load_model("vmamba_tiny_s1l8", name)


def test_conversion(publish, contents, tmp_path, capsys):
    publish("vssd_nano", entry="ema")
    assert get_ckpt.main([str(NAME), str(tmp_path / "out.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "model_ema (the file holds model, model_ema)" in said and "vssd_nano.pth" in said
    found, expected = load_file(tmp_path / "out.safetensors"), contents["vssd_nano"]["model_ema"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
