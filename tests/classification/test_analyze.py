"""The two pictures of a run."""

import json

import pytest
from PIL import Image

from analyze import loss
from analyze.impl import predictions
from analyze.predictions import main as predictions_main
from ssm_train.record.curves import read_curves
from ssm_train.record.report import write_report


@pytest.fixture
def run(cli, tmp_path):
    assert cli("--output", tmp_path / "run").status == 0
    return tmp_path / "run"


def test_curves(run, tmp_path, capsys):
    """A real run's curves are its log's numbers, and its own report shows its own metrics."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    series = read_curves(run).series
    assert series["train/loss"].x == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    for key in ("loss", "lr", "grad_norm", "images_per_second", "data_wait"):
        assert series[f"train/{key}"].y == [entry[key] for entry in entries if entry["kind"] == "train"]
    for key in ("loss", "top1", "ema_loss", "ema_top1"):
        assert series[f"val/{key}"] == ([1.0, 2.0], [entry[key] for entry in entries if entry["kind"] == "val"])
    metrics = json.loads((run / "metrics.json").read_text())
    text = write_report(run).read_text()
    assert f"**{metrics['top1']:.2f} %** top-1" in text and f"| parameters | {metrics['parameters']:,} |" in text
    capsys.readouterr()
    assert loss.main(["--run", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    out = tmp_path / "deep" / "curves.png"
    assert loss.main(["--run", str(run), str(run), "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 1000 and capsys.readouterr().out.strip() == str(out)
    assert loss.main(["--run", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_predictions(run, image_tree, capsys):
    assert predictions_main(["--run", str(run), "--count", "12"]) == 0
    assert Image.open(run / "predictions.png").size[0] > 1000
    more = ["--data-path", str(image_tree), "--count", "99", "--out", str(run / "all.png")]
    assert predictions_main(["--run", str(run), *more]) == 0
    capsys.readouterr()
    assert predictions_main(["--run", str(run / "checkpoints")]) == 2
    assert predictions_main(["--run", str(run), "--count", "0"]) == 2
    assert predictions_main(["--run", str(run), "--out", "predictions.json"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_predictions_are_those_of_the_recorded_weights(run):
    """All images of the sheet together give the recorded top-1, so the right weights were drawn."""
    from ssm_train.config.load import parse_config

    metrics = json.loads((run / "metrics.json").read_text())
    weights, text = predictions.best_weights(run)
    assert weights == run / metrics["checkpoint"]
    found = predictions.predict(parse_config(text), weights, 15, predictions.torch.device("cpu"))
    right = sum(prediction.predicted == prediction.true for prediction in found)
    assert 100 * right / 15 == pytest.approx(metrics["top1"])
    assert [prediction.true for prediction in found] == ["cat"] * 5 + ["dog"] * 5 + ["eel"] * 5
    figure = predictions.draw(found)
    red = sum(axes.title.get_color() == "red" for axes in figure.axes)
    assert red == 15 - right
