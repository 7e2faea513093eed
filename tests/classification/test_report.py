"""report.md and curves.png: the numbers are those of the run folder, for finished and unfinished runs."""

import json
import math
import re

import pytest
from PIL import Image

from ssm_train.config.defaults import default_config
from ssm_train.record import report
from ssm_train.record.curves import curves, draw, read_curves
from ssm_train.record.logger import RunLog
from ssm_train.record.report import write_report


def train_entry(epoch, iteration, update, **more):
    values = {"loss": 1.0 / update, "lr": 0.001 * update, "grad_norm": 2.0, "images_per_second": 100.0 * epoch}
    values |= {"data_wait": 0.25, "memory_mb": 100.0 + update}
    return {"kind": "train", "update": update, "epoch": epoch, "iteration": iteration, **values, **more}


def val_entry(epoch, update, top1, **more):
    values = {"epoch": epoch, "top1": top1, "top5": 90.25, "loss": 0.5, "images": 40, "excluded": epoch}
    return {"kind": "val", "update": update, **values, "seconds": 60.5 * epoch, **more}


def event(what, update, epoch, slot, **more):
    return {"kind": "event", "update": update, "what": what, "epoch": epoch, "slot": slot, **more}


EMA = {"ema_top1": 88.125, "ema_top5": 97.0, "ema_loss": 0.375}
ENTRIES = [
    train_entry(1, 2, 2),
    train_entry(1, 4, 4, grad_norm=None),
    val_entry(1, 4, 81.25, **EMA),
    train_entry(2, 2, 6),
    train_entry(2, 4, 8),
    val_entry(2, 8, 79.5, ema_top1=86.0, ema_top5=97.0, ema_loss=0.5),
]


def fill(folder, entries):
    """A run folder as training leaves it."""
    cfg = default_config()
    cfg.MODEL.NAME, cfg.TRAIN.EPOCHS, cfg.DATA.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS = "vim_nano", 2, 16, 3
    (folder / "config.yaml").write_text(cfg.dump())
    with RunLog(True) as log:
        log.open_series(folder, 0)
        for entry in entries:
            rest = {name: value for name, value in entry.items() if name not in ("kind", "update")}
            log.record(entry["kind"], entry["update"], rest)
    return folder


def cells(text):
    """All tables of a report: first cell -> the others."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *others = (cell.strip() for cell in line.strip("| ").split(" | "))
            found[first] = others
    return found


METRICS = {
    "mode": "train",
    "top1": 91.5,
    "parameters": 252682,
    "device": "NVIDIA H200",
    "processes": 2,
    "amp": "bf16",
    "seconds": 3661.5,
    "images_per_second": 777.75,
    "epochs": 2,
    "skipped_updates": 5,
    "rollbacks": 1,
    "bad_images": 2,
    "versions": {"python": "3.11.2", "torch": "2.11.0", "commit": "0123abcd"},
    "results": {
        "best": {"epoch": 1, "top1": 81.25, "top5": 90.25, "loss": 0.51234, "images": 40},
        "last": {"epoch": 2, "top1": 79.5, "top5": 90.0, "loss": 0.5, "images": 40},
        "best_ema": {"epoch": 1, "top1": 91.5, "top5": 97.0, "loss": 0.375, "images": 40},
        "last_ema": {"epoch": 2, "top1": 86.0, "top5": 97.0, "loss": 0.5, "images": 40},
    },
}


def test_curves():
    found = curves("run", ENTRIES).series
    assert found["train/loss"] == ([0.5, 1.0, 1.5, 2.0], [1 / 2, 1 / 4, 1 / 6, 1 / 8])
    assert found["train/lr"].y == pytest.approx([0.002, 0.004, 0.006, 0.008])
    assert found["train/grad_norm"].y[0] == 2.0 and math.isnan(found["train/grad_norm"].y[1])
    assert found["train/images_per_second"].y == [100.0, 100.0, 200.0, 200.0]
    assert found["val/top1"] == ([1.0, 2.0], [81.25, 79.5])
    assert found["val/ema_loss"] == ([1.0, 2.0], [0.375, 0.5])
    # the mean of an epoch stands at its middle
    assert found["epoch/train_loss"] == ([0.5, 1.5], pytest.approx([3 / 8, 7 / 48]))


def test_curves_of_repeated_and_incomplete_epochs():
    again = [train_entry(2, 2, 6, loss=9.0), train_entry(3, 1, 9), event("resumed", 6, 1, 2)]
    found = curves("run", [*ENTRIES, *again]).series
    # the third epoch has just begun: it is as long as those before
    assert found["train/loss"].x == [0.5, 1.0, 1.5, 2.0, 2.25]
    assert found["train/loss"].y[2] == 9.0
    # another batch size, so another number of iterations
    longer = [train_entry(3, iteration, 8 + iteration) for iteration in (4, 8)] + [val_entry(3, 16, 80.0)]
    assert curves("run", [*ENTRIES, *longer]).series["train/loss"].x == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_picture():
    figure = draw(curves("a", ENTRIES))
    lines = {axes.get_title(): {line.get_label(): line for line in axes.get_lines()} for axes in figure.axes}
    assert {title: set(drawn) for title, drawn in lines.items()} == {
        "loss": {"training", "training, mean of epoch", "validation", "validation, EMA"},
        "validation accuracy": {"model", "EMA"},
        "learning rate": {"learning rate"},
        "gradient": {"before clipping"},
        "training throughput": {"all processes"},
        "waiting for data": {"mean of processes"},
    }
    assert list(lines["validation accuracy"]["model"].get_ydata()) == [81.25, 79.5]
    assert all(axes.get_legend() and axes.get_xlabel() == "epoch" and axes.get_ylabel() for axes in figure.axes)
    # what a colour-blind reader needs: weights and averages differ in colour and in style
    model, ema = lines["validation accuracy"].values()
    assert model.get_color() != ema.get_color() and model.get_linestyle() != ema.get_linestyle()
    speed = next(axes for axes in figure.axes if axes.get_title() == "training throughput")
    assert speed.get_ylim()[0] == 0 and speed.get_ylim()[1] > 200
    figure.canvas.draw()
    for axes in figure.axes:
        legend, panel = (part.get_window_extent() for part in (axes.get_legend(), axes))
        assert legend.y1 < panel.y0 and 0 <= legend.x0 < legend.x1 <= figure.bbox.x1 and legend.y0 >= 0


def test_finished_run(tmp_path):
    folder = fill(tmp_path, ENTRIES)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "bad_images.json").write_text(
        json.dumps({"train/cat/1.png": "truncated | file", "train/eel/2.png": "no"})
    )
    path = write_report(folder)
    assert path == folder / "report.md"
    text = path.read_text()
    found = cells(text)
    for name, record in METRICS["results"].items():
        numbers = [float(cell) for cell in found[name]]
        assert numbers == [record["epoch"], record["top1"], record["top5"], pytest.approx(record["loss"], abs=5e-5), 40]
    assert "Finished: 2 epochs, 8 updates." in text
    assert "**91.50 %** top-1, by `checkpoints/best_ema` (epoch 1)." in text
    assert found["model"] == ["`vim_nano`"] and found["parameters"] == ["252,682"]
    assert found["images per update"][0].endswith("x 2 processes = 96")
    assert found["device"] == ["2 x NVIDIA H200"] and found["precision"] == ["bf16"]
    assert found["versions"] == ["python 3.11.2, torch 2.11.0"] and found["commit"] == ["`0123abcd`"]
    assert found["highest learning rate"] == ["0.008"]
    assert found["`TRAIN.EPOCHS`"] == ["`2`", "`300`"] and "`TRAIN.WEIGHT_DECAY`" not in found
    assert found["training, validation and saving"] == ["1:01:02 (3661.5 s)"]
    assert found["training throughput"] == ["777.8 images/s"]
    assert found["waiting for data"] == ["25.0 % of training time"] and found["peak memory"] == ["108 MB per process"]
    assert found["updates skipped (loss or gradient not finite)"] == ["5"] and found["rolled back"] == ["1"]
    assert found["unreadable training images"] == ["2"] and found["unreadable validation images"] == ["2"]
    assert "- `train/cat/1.png`: truncated | file" in text and "](curves.png)" in text
    assert Image.open(folder / "curves.png").size == (1560, 900)


def test_unfinished_run_with_events(tmp_path):
    skipped = [event("skipped", 4, 1, slot, grad_norm="inf") for slot in (0, 1, 1)]
    others = [event("rolled_back", 4, 1, 2, to="epoch_0001"), event("preempted", 4, 1, 3), event("resumed", 4, 1, 3)]
    folder = fill(tmp_path, [*ENTRIES[:3], *skipped, *others, event("resumed", 4, 1, 3)])
    (folder / "nonfinite").mkdir()
    (folder / "nonfinite/epoch_0001_rank0.json").write_text("{}")
    text = write_report(folder).read_text()
    found = cells(text)
    assert "**Unfinished**: 1 of 2 epochs validated, 4 updates made." in text
    assert found["best"] == found["last"] == ["1", "81.25", "90.25", "0.5000", "40"]
    assert found["best_ema"] == ["1", "88.12", "97.00", "0.3750", "40"]
    assert "**88.12 %** top-1, by `checkpoints/best_ema` (epoch 1)." in text
    # a skip that a resumed run met again is one
    assert found["updates skipped (loss or gradient not finite)"] == ["2"]
    assert (found["rolled back"], found["preempted"], found["resumed"]) == (["1"], ["1"], ["2"])
    assert "- after 4 updates: rolled back (epoch 1, slot 2, to epoch_0001)" in text
    assert (
        text.count("- after 4 updates: skipped (epoch 1, slot ") == 2 and "- `nonfinite/epoch_0001_rank0.json`" in text
    )
    assert found["training, validation and saving"] == ["0:01:00 (60.5 s)"] and "device" not in found


def test_before_the_first_validation(tmp_path):
    text = write_report(fill(tmp_path, ENTRIES[:1])).read_text()
    assert "0 of 2 epochs validated" in text and "No epoch has been validated." in text
    assert cells(text)["training throughput"] == ["100.0 images/s"]


def test_numbers_of_an_earlier_end_are_not_taken(tmp_path):
    """A finished run that was continued, and an evaluation in the folder of a run that never ended."""
    folder = fill(tmp_path, [*ENTRIES, train_entry(3, 4, 12), val_entry(3, 12, 99.0)])
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    text = write_report(folder).read_text()
    assert cells(text)["best"][:2] == ["3", "99.00"] and "Unfinished" in text
    (folder / "metrics.json").write_text(json.dumps({"mode": "eval", "results": {"model": {}}}))
    assert write_report(folder).read_text() == text


def test_long_lists_are_cut(tmp_path):
    folder = fill(tmp_path, [*ENTRIES, *(event("resumed", 8, 1, slot) for slot in range(40))])
    (folder / "bad_images.json").write_text(json.dumps({f"{number}.png": "empty" for number in range(31)}))
    text = write_report(folder).read_text()
    assert text.count(": resumed (") == 30 and "- and 10 more, see `log.jsonl`" in text
    assert text.count(".png`: empty") == 30 and "- and 1 more, see `bad_images.json`" in text


def test_command_line(tmp_path, capsys):
    assert report.main([str(fill(tmp_path, ENTRIES))]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    assert report.main([str(tmp_path / "none")]) == 2
    assert "none/config.yaml: No such file or directory" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("")
    assert report.main([str(tmp_path)]) == 2
    assert "holds no entries yet" in capsys.readouterr().err


def test_read_curves_names_the_run(tmp_path, monkeypatch):
    fill(tmp_path, ENTRIES)
    monkeypatch.chdir(tmp_path)
    assert read_curves(report.Path(".")).name == tmp_path.name


def test_classes(tmp_path):
    """The worst first, what they were taken for, and names that Markdown would read as marks."""
    folder = fill(tmp_path, ENTRIES)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    assert "## Classes" not in write_report(folder).read_text()
    lines = [("class", "predicted", "images"), ("a|b", "a|b", 4), ("*dog*", "*dog*", 1), ("*dog*", "eel", 2)]
    lines += [("*dog*", "a|b", 1), ("eel", "eel", 0)]
    (folder / "validation_confusion.csv").write_text("\n".join(",".join(map(str, line)) for line in lines) + "\n")
    text = write_report(folder).read_text()
    table, matrix = text.partition("## Classes")[2].partition("Confusion matrix")[::2]
    assert re.findall(r"^\| (\S+) \| \d", table, flags=re.MULTILINE) == ["\\*dog\\*", "a\\|b", "eel"]
    assert "| \\*dog\\* | 4 | 25.0 | eel (2), a\\|b (1) |" in table and "| eel | 0 |  |  |" in table
    assert (
        "|  | a\\|b | \\*dog\\* | eel |" in matrix
        and "| \\*dog\\* | 1 | 1 | 2 |" in matrix
        and "](validation_worst.png)" in matrix
    )
    # of many classes the worst alone, and no matrix
    names = [f"class {number:02}" for number in range(40)]
    rows = [f"{name},{name},1\n" + f"{name},class 07,1\n" * (name != "class 07") for name in names]
    (folder / "validation_confusion.csv").write_text("class,predicted,images\n" + "".join(rows))
    text = write_report(folder).read_text()
    assert "the worst first. 10 others are in `validation_confusion.csv`" in text and "Confusion matrix" not in text
    assert "| class 00 | 2 | 50.0 | class 07 (1) |" in text and "| class 07 |" not in text
