"""The most probable classes of images, and their names."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from analyze.impl import predict
from analyze.predict import main
from ssm_train.common.errors import UserError
from ssm_train.config.defaults import default_config


@pytest.fixture
def photos(tmp_path):
    """40 pictures, more than a batch, and the folder."""
    random = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{index:02}.png")
    return tmp_path


@pytest.fixture
def model(monkeypatch):
    made = timm.create_model("vim_nano", depth=1, embed_dim=16, num_classes=4).eval()
    nn.init.normal_(made.head.weight, std=3)  # so that images get different answers
    monkeypatch.setattr(predict.inputs, "load_model", lambda name, checkpoint, which, allow_nonfinite: made)
    return made


def test_table_and_sheet(photos, model, tmp_path, capsys):
    """Every line of the table is what the model says of that picture alone; the sheet says the same."""
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat, house cat\ndog\n")
    out = tmp_path / "out" / "sheet.png"
    line = ["--model", "vim_nano", "--images", str(photos), "--top", "3", "--classes", str(names), "--out", str(out)]
    assert main(line) == 0
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 * 3 and len({row["class"] for row in rows if row["rank"] == "1"}) > 1
    transform = predict.inputs.evaluation_transform("vim_nano", None)
    for number, path in enumerate(sorted(photos.glob("*.png"))):
        with torch.inference_mode():
            shares = model(transform(Image.open(path))[None])[0].softmax(0)
        order = shares.argsort(descending=True)[:3].tolist()
        mine = rows[3 * number : 3 * number + 3]
        assert [row["image"] for row in mine] == [str(path)] * 3 and [row["rank"] for row in mine] == ["1", "2", "3"]
        assert [int(row["index"]) for row in mine] == order
        assert [row["class"] for row in mine] == [["ant", "bee", "cat, house cat", "dog"][index] for index in order]
        np.testing.assert_allclose([float(row["probability"]) for row in mine], shares[order], atol=2e-6)
    first = rows[0]
    assert capsys.readouterr().out.splitlines() == [
        f"{first['image']}: {first['class']} {float(first['probability']):.1%}",
        str(out),
        str(out.with_suffix(".csv")),
    ]
    assert Image.open(out).size[0] > 1000


def test_sheet_shows_what_the_model_saw():
    pixels = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]], [[0.25, 0.75]]])
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    answer = predict.Answer("deep/a.png", (pixels - mean) / std, [2, 0], [0.875, 0.0625])
    (axes,) = predict.draw([answer], ["ant", "bee", "cat, house cat"], "vim_nano", "title").axes
    assert axes.get_title() == "cat  88%\nant  6.2%" and axes.get_xlabel() == "a.png"
    np.testing.assert_allclose(axes.images[0].get_array(), pixels.permute(1, 2, 0), atol=1e-6)


def test_class_names(tmp_path, monkeypatch):
    """Of a file, of a run's data, of ImageNet, or numbers."""
    assert predict.class_names(2, None, None) == ["class 0", "class 1"]
    imagenet = predict.class_names(1000, None, None)
    assert imagenet[0].startswith("tench") and imagenet[281].startswith("tabby") and len(imagenet) == 1000
    for name in ("val/oak", "val/elm"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
    cfg = default_config()
    cfg.DATA.DATA_PATH, cfg.MODEL.NUM_CLASSES = str(tmp_path), 2
    monkeypatch.setattr(predict.inputs, "run_config", lambda checkpoint: checkpoint and cfg)
    assert predict.class_names(2, tmp_path, None) == ["elm", "oak"]
    file = tmp_path / "names.txt"
    file.write_text("a\nb\n")
    assert predict.class_names(2, tmp_path, file) == ["a", "b"]
    with pytest.raises(UserError, match="names.txt has 2 lines, but the model has 3 classes"):
        predict.class_names(3, tmp_path, file)
    cfg.DATA.DATA_PATH = str(tmp_path / "moved")
    with pytest.raises(UserError, match="moved is not a folder.*; or give them as --classes FILE"):
        predict.class_names(2, tmp_path, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vim_nano", "--top", "0"], "--top is 0"),
        (["--model", "vim_nan"], "did you mean vim_nano"),
        (["--model", "vim_nano", "--images", "nowhere.png"], "nowhere.png does not exist"),
        (["--model", "vim_nano", "--classes", "nowhere.txt"], "--classes nowhere.txt cannot be read"),
        (["--model", "vim_nano", "--size", "2"], "vim_nano takes no images of 2x2 pixels"),
        (["--model", "vim_nano", "--out", "sheet.csv"], "--out sheet.csv does not end in .png"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
