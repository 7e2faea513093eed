"""analyze/scaleup.py with a model whose accuracy at every size is known by construction."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from analyze.impl import scaleup
from analyze.scaleup import main
from ssm_train.config.defaults import default_config

DATA = Path(__file__).parents[1] / "data/logs"
COLORS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
WEIGHTS = {"which": "auto", "allow_nonfinite": False}
COUNTS = {"blue": 2, "green": 3, "red": 5}


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """val/<colour>/*.png: 2 blue, 3 green and 5 red images, each of one colour."""
    root = tmp_path_factory.mktemp("colors")
    for name, count in COUNTS.items():
        (root / "val" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 32), COLORS[name]).save(root / "val" / name / f"{number}.png")
    return root


class Picky(nn.Module):
    """Tells all colours at 32 pixels, takes red for blue at 48, says blue at all other sizes and fails at 64."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        assert images.shape[2] == images.shape[3]
        size = images.shape[-1]
        if size == 64:
            raise RuntimeError("no such map")
        logits = images.mean((2, 3)).flip(1)  # blue, green, red
        if size == 48:
            logits = logits - torch.tensor([0.0, 0.0, 1e3])
        elif size != 32:
            logits = torch.tensor([1.0, 0.0, 0.0]).expand(len(images), 3)
        return logits * self.scale


@pytest.fixture
def picky(monkeypatch):
    monkeypatch.setattr(scaleup, "load_model", lambda name, checkpoint, which, allow_nonfinite: Picky().eval())


def table(path):
    return {(row["model"], row["source"], int(row["size"])): row for row in csv.DictReader(path.open())}


def start(*arguments):
    return main([*map(str, arguments), "--device", "cpu", "--rounds", "2", "--seconds", "0"])


def test_known_accuracies(colors, picky, tmp_path, capsys):
    out = tmp_path / "deep" / "scaleup.png"
    command = ["--models", "vmamba_nano", "--checkpoints", "x.pth", "--data-path", colors, "--batch", 4]
    assert start(*command, "--sizes", 16, 32, 48, 64, "--out", out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [str(out), str(out.with_suffix(".csv"))] and Image.open(out).size[0] > 1000
    rows = table(out.with_suffix(".csv"))
    found = {size: float(row["top1"] or "nan") for (*_, size), row in rows.items()}
    assert found == pytest.approx({16: 20.0, 32: 100.0, 48: 50.0, 64: float("nan")}, nan_ok=True)
    for size in (16, 32, 48):
        row = rows["vmamba_nano", "x.pth", size]
        assert (row["images"], row["status"], row["trained_size"]) == ("10", "ok", "32")
        assert (row["top5"], row["batch"], row["precision"]) == ("100.0", "4", "fp32")
        assert 0 < float(row["slowest"]) <= float(row["images_per_second"]) <= float(row["fastest"])
        # nothing is larger than the batch of images
        assert float(row["peak_mib"]) == pytest.approx(4 * 4 * 3 * size**2 / 2**20, rel=0.1)
    failed = rows["vmamba_nano", "x.pth", 64]
    assert failed["status"] == "failed: no such map" and failed["images_per_second"] == failed["top1"] == ""


def test_loss_is_that_of_the_logits(colors, picky):
    args = SimpleNamespace(data_path=str(colors), dataset="folder", batch=3, workers=0, **WEIGHTS)
    trained = scaleup.load("vmamba_nano", colors / "x.pth", args)
    found = scaleup.accuracy(trained, 16, "fp32", torch.device("cpu"))
    blue, other = torch.log_softmax(torch.tensor([1.0, 0.0, 0.0]), 0)[:2].tolist()
    assert found.loss == pytest.approx(-(2 * blue + 8 * other) / 10) and found.images == 10


def test_weights_from_a_file(colors, tmp_path):
    """The accuracy is that of these weights, counted by hand."""
    torch.manual_seed(1)
    model = timm.create_model("vmamba_nano", num_classes=3).eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    right = 0
    for label, name in enumerate(COLORS):
        image = (torch.tensor(COLORS[name])[:, None, None] / 255 - mean) / std
        right += COUNTS[name] * (model(image.expand(1, 3, 24, 24)).argmax().item() == label)
    out = tmp_path / "scaleup.png"
    files = ["--models", "vmamba_nano", "--checkpoints", tmp_path / "w.safetensors", "--data-path", colors]
    assert start(*files, "--sizes", 24, "--out", out) == 0
    [row] = table(out.with_suffix(".csv")).values()
    assert float(row["top1"]) == pytest.approx(10.0 * right)


@pytest.mark.parametrize("size, ratio, kept", [(32, 0.875, 1.0), (64, 0.875, 0.875), (64, 1.0, 1.0)])
def test_images_are_cropped_as_in_training(size, ratio, kept, monkeypatch, picky):
    cfg = default_config()
    cfg.MODEL.NAME, cfg.DATA.IMG_SIZE, cfg.DATA.CROP_RATIO = "vim_nano", size, ratio
    monkeypatch.setattr(scaleup, "run_config", lambda checkpoint: cfg)
    args = SimpleNamespace(data_path="some", dataset="folder", batch=7, workers=0, **WEIGHTS)
    trained = scaleup.load(None, "run", args)
    data = trained.cfg.DATA
    found = [trained.label, data.CROP_RATIO, data.IMG_SIZE, data.BATCH_SIZE, trained.cfg.MODEL.NUM_CLASSES]
    assert found == ["vim_nano", kept, size, 7, 3]


def test_authors_transforms(picky):
    args = SimpleNamespace(data_path="some", dataset="folder", batch=7, workers=0, **WEIGHTS)
    data = scaleup.load("swin_tiny_patch4_window7_224", Path("swin.pth"), args).cfg.DATA
    found = [data.IMG_SIZE, data.CROP_RATIO, data.INTERPOLATION]
    assert found == [224, 0.9, "bicubic"]


def test_numbers_of_former_evaluations(tmp_path, capsys):
    record = {"images": 50, "top5": 90.0, "loss": 1.5}
    for folder, metrics in {
        "a": {"mode": "eval", "model": "vssd_nano", "top1": 61.5, **record},
        "b": {"mode": "train", "model": "vssd_nano", "top1": 99.0, **record, "eval": {
            "mode": "eval", "model": "vssd_nano", "top1": 72.5, **record}},
        "c": {"mode": "train", "model": "vssd_nano", "top1": 83.5, **record},
    }.items():  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.json").write_text(json.dumps(metrics))
    out = tmp_path / "scaleup.png"
    logs = [f"{size}={tmp_path / folder}" for size, folder in ((48, "a"), (32, "b"), (96, "c"))]
    assert main(["--logs", *logs, "--out", str(out)]) == 0
    rows = table(out.with_suffix(".csv"))
    assert {size: float(row["top1"]) for (*_, size), row in rows.items()} == {48: 61.5, 32: 72.5, 96: 83.5}
    assert {row["images_per_second"] for row in rows.values()} == {""} and len(capsys.readouterr().out.split("\n")) == 6
    [axes] = scaleup.draw([scaleup.read_log(entry) for entry in logs]).axes
    assert list(axes.lines[0].get_xdata()) == [32, 48, 96] and list(axes.lines[0].get_ydata()) == [72.5, 61.5, 83.5]


def test_logs_of_other_trainers(tmp_path, capsys):
    """What VMamba's own script printed, and evaluations of Swin's trainer, the last of a file."""
    evaluation = tmp_path / "eval.txt"
    evaluation.write_text(" * Acc@1 10.0 Acc@5 20.0\n * Acc@1 83.5 Acc@5 96.5\n")
    others = [str(DATA / "vmamba_scaleup.log"), f"288={evaluation}"]
    assert main(["--logs", *others, "--out", str(tmp_path / "scaleup.png")]) == 0
    assert "vmamba_scaleup             224 px  top-1  82.17 %\n" in capsys.readouterr().out
    rows = [row for entry in others for row in scaleup.read_logs(entry)]
    found = [(row["model"], row["size"], row["top1"], row["top5"]) for row in rows]
    assert found[:2] == [("vmamba_scaleup", 64, 45.341, 69.076), ("vmamba_scaleup", 224, 82.169, 96.028)]
    assert found[2:] == [("eval", 288, 83.5, 96.5)]
    for entry in (f"224={others[0]}", str(evaluation), f"big={evaluation}"):
        assert main(["--logs", entry, "--out", str(tmp_path / "no.png")]) == 2
        assert f"error: --logs {entry} must be SIZE=FOLDER, SIZE=FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--checkpoints", "none"], ["--checkpoint none is no run of ours: give --model"]),
        (["--checkpoints", "none", "--models", "vmamba_nan"], ["'vmamba_nan' is not a registered model"]),
        (
            ["--checkpoints", "none", "--models", "vmamba_nano"],
            ["--checkpoint none is neither a file nor the name of published weights"],
        ),
        (["--checkpoints", "a", "--models", "vmamba_nano", "vim_nano"], ["--model: 2 for 1 --checkpoint"]),
        (["--checkpoints", "a", "--sizes", "0"], ["--size 0 must be at least 1"]),
        (["--checkpoints", "a", "--out", "up.pdf"], ["--out up.pdf does not end in .png"]),
        (["--logs", "runs/a"], ["--logs runs/a must be SIZE=FOLDER"]),
        (["--logs", "32=none"], ["--logs 32=none: cannot read none/metrics.json: No such file"]),
    ],
)
def test_errors_name_the_value(arguments, parts, capsys, tmp_path):
    assert start("--out", tmp_path / "scaleup.png", *arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("error: ") and captured.out == ""
    assert all(part in captured.err for part in parts) and list(tmp_path.iterdir()) == []


def test_other_errors(colors, picky, capsys, tmp_path):
    """Data that is not there stops the command; metrics of something else are named."""
    (tmp_path / "metrics.json").write_text('{"model": "vim_nano"}')
    files = ["--models", "vmamba_nano", "--checkpoints", "x.pth"]
    assert start(*files, "--data-path", tmp_path / "none", "--out", tmp_path / "scaleup.png") == 2
    assert start("--logs", f"32={tmp_path}", "--out", tmp_path / "scaleup.png") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "none is not a folder" in first and "holds no accuracies of classification/main.py" in second
