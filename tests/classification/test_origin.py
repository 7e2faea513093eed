"""Where results come from: which weights, which set of a file, which command, which evaluation; and that it is said."""

import hashlib
import json

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from ssm_train.config.load import parse_config
from ssm_train.record.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return {"root": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def run(cli, shared):
    """A run of two epochs at 48 pixels, resized to the square by bilinear interpolation. Read-only."""
    if "run" not in shared:
        shared["run"] = shared["root"] / "run"
        options = ["DATA.IMG_SIZE", 48, "DATA.CROP_RATIO", 1.0, "DATA.INTERPOLATION", "bilinear", "TRAIN.EPOCHS", 2]
        assert cli("--output", shared["run"], "--opts", *options).status == 0
    return shared["run"]


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("option", ["--pretrained", "--resume"])
def test_evaluated_as_trained(cli, run, tmp_path, option):
    """The config says 32 pixels; the run was trained and validated at 48, and its numbers come again."""
    outcome = cli("--eval", option, run / "checkpoints/last", "--output", tmp_path / "a")
    assert outcome.status == 0
    assert f"DATA.IMG_SIZE is 48, as of the run that wrote {(run / 'checkpoints').resolve()}" in outcome.out, (
        outcome.out
    )
    assert "in place of the config's 32 (--opts changes it)" in outcome.out
    found, trained = metrics_of(tmp_path / "a"), metrics_of(run)["results"]
    assert (found["image_size"], found["crop_ratio"], found["interpolation"]) == (48, 1.0, "bilinear")
    for weights, record in (("model", "last"), ("model_ema", "last_ema")):
        assert found["results"][weights]["loss"] == trained[record]["loss"]
    told = cli("--eval", option, run / "checkpoints/last", "--output", tmp_path / "b", "--opts", "DATA.IMG_SIZE", 32)
    assert told.status == 0 and "DATA.IMG_SIZE is" not in told.out and "DATA.CROP_RATIO is 1.0" in told.out
    other = metrics_of(tmp_path / "b")
    assert other["image_size"] == 32 and other["results"]["model"]["loss"] != trained["last"]["loss"]


def test_both_sets_of_a_file(cli, run, tmp_path):
    """As upstream's --eval; the file does not say which of them was published."""
    folder = run / "checkpoints/last"
    sets = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "model_ema")}
    torch.save({**sets, "epoch": 3}, tmp_path / "both.pth")
    size = ["--opts", "DATA.IMG_SIZE", 48, "DATA.CROP_RATIO", 1.0, "DATA.INTERPOLATION", "bilinear"]
    outcome = cli("--eval", "--pretrained", tmp_path / "both.pth", "--output", tmp_path / "a", *size)
    assert outcome.status == 0
    assert "it holds model and ema weights, taken: model" in outcome.out and "evaluated, too:" in outcome.out
    found, trained = metrics_of(tmp_path / "a")["results"], metrics_of(run)["results"]
    assert found["model"]["loss"] == trained["last"]["loss"] != trained["last_ema"]["loss"]
    assert found["model_ema"]["loss"] == trained["last_ema"]["loss"]
    one = ("--eval", "--pretrained", tmp_path / "both.pth", "--which", "ema", "--output", tmp_path / "b", *size)
    assert cli(*one).status == 0
    assert list(metrics_of(tmp_path / "b")["results"]) == ["model_ema"]


def test_a_load_says_which_set_it_took(tmp_path, caplog):
    import ssm_models

    model = timm.create_model("vssd_nano")
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict()}, tmp_path / "both.pth")
    ssm_models.load_checkpoint(model, tmp_path / "both.pth")
    assert f"{tmp_path}/both.pth holds model and model_ema; taken: model (which: model or ema)" in caplog.text
    caplog.clear()
    ssm_models.load_checkpoint(model, tmp_path / "both.pth", which="ema")
    assert not caplog.records


def test_origin_of_a_run(cli, run, read_log, tmp_path):
    """The weights it began with and its commands stand in everything that it leaves, after a resume, too."""
    folder = run / "checkpoints/best"
    file = folder.resolve() / f"{read_checkpoint(folder).meta['weights']}.safetensors"
    expected = {
        "name": str(run),
        "file": str(file),
        "entry": "",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "fresh_classifier": True,
    }
    out = tmp_path / "out"
    start = ("--output", out, "--pretrained", run, "--new-head", "--opts", "TRAIN.WEIGHT_DECAY", 0.01)
    assert cli(*start, "TRAIN.EPOCHS", 2).status == 0
    for number, metrics in enumerate((metrics_of(out), read_checkpoint(out / "checkpoints/last").meta)):
        assert metrics["pretrained"] == expected, number
        assert metrics["command"].startswith("classification/main.py --cfg ")
        assert metrics["command"].endswith("--new-head --opts TRAIN.WEIGHT_DECAY 0.01 TRAIN.EPOCHS 2")
    text = (out / "config.yaml").read_text()
    assert text.startswith("# command: classification/main.py --cfg ") and expected["sha256"] in text
    assert parse_config(text).TRAIN.WEIGHT_DECAY == 0.01 == yaml.safe_load(text)["TRAIN"]["WEIGHT_DECAY"]
    report = (out / "report.md").read_text()
    assert expected["sha256"] in report and "--new-head --opts TRAIN.WEIGHT_DECAY 0.01" in report
    # of the checkpoint's, not of the resume's command line
    resume = ("--output", out, "--resume", "auto", "--allow-changes", "--opts", "TRAIN.WEIGHT_DECAY", 0.01)
    assert cli(*resume, "TRAIN.EPOCHS", 3).status == 0
    assert metrics_of(out)["pretrained"] == expected and "--resume auto" in metrics_of(out)["command"]
    assert [event["what"] for event in read_log(out, "event")] == ["started", "resumed"]
    assert expected["sha256"] in (out / "config.yaml").read_text()


def test_origin_of_an_evaluation(cli, run, tmp_path):
    file = run / "checkpoints/last/model.safetensors"
    assert cli("--eval", "--pretrained", file, "--output", tmp_path).status == 0
    found = metrics_of(tmp_path)
    assert found["pretrained"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["command"].split()[3:5] == ["--eval", "--pretrained"]
