"""The two pictures of a run."""

import json

import pytest
from PIL import Image

from analyze import loss, predictions


@pytest.fixture
def run(cli, tmp_path):
    assert cli("--output", tmp_path / "run").status == 0
    return tmp_path / "run"


def test_curves(run, tmp_path, capsys):
    log = run / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    # a resumed run repeats entries, and a killed one leaves half a line: the later entry holds, the rest is skipped
    repeated = {**next(e for e in entries if e["kind"] == "train" and e["epoch"] == 2), "loss": 0.125}
    log.write_text(log.read_text() + '{"kind": "tra\n' + json.dumps(repeated) + "\n")
    curves = loss.read_curves(run)
    assert list(curves.train) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    assert curves.train[1.2]["loss"] == 0.125
    assert list(curves.val) == [1.0, 2.0]
    figure = loss.draw([curves])
    lines = {line.get_label(): list(line.get_ydata()) for axes in figure.axes for line in axes.get_lines()}
    assert set(lines) == {"training", "validation", "validation, EMA", "model", "EMA"}
    assert lines["model"] == [entry["top1"] for entry in entries if entry["kind"] == "val"]
    out = tmp_path / "deep" / "curves.png"
    assert loss.main(["--run", str(run), str(run), "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 1000 and capsys.readouterr().out.strip() == str(out)
    assert loss.main(["--run", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_predictions(run, image_tree, capsys):
    assert predictions.main(["--run", str(run), "--count", "12"]) == 0
    assert Image.open(run / "predictions.png").size[0] > 1000
    more = ["--data-path", str(image_tree), "--count", "99", "--out", str(run / "all.png")]
    assert predictions.main(["--run", str(run), *more]) == 0
    capsys.readouterr()
    assert predictions.main(["--run", str(run / "checkpoints")]) == 2
    assert predictions.main(["--run", str(run), "--count", "0"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_predictions_are_those_of_the_recorded_weights(run):
    """All images of the sheet together give the recorded top-1, so the right weights were drawn."""
    from classification.config import parse_config

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
