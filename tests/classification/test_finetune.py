"""From a folder of photographs to a model, its report and the commands that go on from there."""

import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import yaml

from ssm_models.weights import find
from ssm_train import trainer
from ssm_train.common import distributed
from ssm_train.common.distributed import World, chosen_device
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.record import answers
from ssm_train.record.answers import Answer, by_class, summary_line
from ssm_train.step.model import build_model
from ssm_train.step.optimizer import build_optimizer
from ssm_train.step.schedule import build_schedule, resolve_rates
from tests.classification.conftest import _write_tree

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "classification"
FAMILIES = ("vmamba", "vim", "vssd")
TINY = ("MODEL.NAME", "vmamba_nano", "MODEL.KWARGS.dims", 8, "MODEL.KWARGS.depths", "[1, 1]", "DATA.NUM_WORKERS", 0)


def recipe(family: str) -> Path:
    return CONFIGS / f"finetune_{family}.yaml"


def pets(folder: Path) -> Path:
    """Three classes of twelve pictures, with names as people give them."""
    _write_tree(folder / "tree")
    for name in ("cat", "dog", "eel"):
        place = folder / "my pets" / f"the {name}'s"
        place.mkdir(parents=True)
        for split in ("train", "val"):
            for path in (folder / "tree" / split / name).iterdir():
                shutil.move(path, place / f"{split} {path.name}")
    return folder / "my pets"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Shared and read-only."""
    return pets(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def tune(cli):
    """tune(folder, run folder, ..., opts=(key, value, ...)): a short training from scratch."""

    def call(data, out, *arguments, opts=()):
        short = ("--from-scratch", "--img-size", 32, "--data-path", data, "--output", out)
        return cli(*short, *arguments, "--opts", *TINY, *opts, cfg=recipe("vmamba"))

    return call


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_from_a_folder_to_a_report_and_commands_that_run(photographs, tune, tmp_path, monkeypatch):
    monkeypatch.undo()  # the pictures, too
    out = tmp_path / "run"
    done = tune(photographs, out, "--epochs", 2, "--lr", 0.01)
    assert done.status == 0, done
    assert (
        "3 classes: 30 images to train on, 6 to validate with, set apart by DATA.VAL_SHARE 0.2 and SEED 0" in done.out
    )
    assert "  the cat's: 10 + 2\n" in done.out and "MODEL.NUM_CLASSES is not given: 3" in done.out
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["TRAIN"]["EPOCHS"] == 2 and config["TRAIN"]["WARMUP_EPOCHS"] == 1
    assert config["DATA"]["BATCH_SIZE"] == 8 and config["MODEL"]["PRETRAINED"] == ""

    split = rows(out / "split.csv")
    assert [sum(row["split"] == name for row in split) for name in ("train", "val")] == [30, 6]
    assert all((photographs / row["image"]).is_file() and row["image"].startswith(row["class"]) for row in split)

    found, metrics = rows(out / "validation.csv"), json.loads((out / "metrics.json").read_text())
    assert {os.path.relpath(row["image"], photographs) for row in found} == {
        row["image"] for row in split if row["split"] == "val"
    }
    right = [row["class"] == row["predicted"] for row in found]
    assert 100 * sum(right) / 6 == pytest.approx(metrics["top1"])
    assert sum(float(row["loss"]) for row in found) / 6 == pytest.approx(metrics["loss"], abs=1e-5)
    for name, of_it in answers.read_counts(out / "validation_confusion.csv").items():
        taken = [row["predicted"] for row in found if row["class"] == name]
        assert next(iter(of_it)) == name and {key: count for key, count in of_it.items() if count} == Counter(taken)
    report = (out / "report.md").read_text()
    assert "## Classes" in report and "](validation_worst.png)" in report and (out / "validation_worst.png").is_file()
    for name in ("the cat's", "the dog's", "the eel's"):
        of_it = [each for each, row in zip(right, found, strict=True) if row["class"] == name]
        assert f"| {name} | 2 | {100 * sum(of_it) / 2:.1f} |" in report

    lines = [line.partition(": ")[2] for line in done.out.splitlines() if ": python " in line]
    assert [Path(shlex.split(line)[1]).name for line in lines] == ["predict.py", "export.py"]
    # the photographs may be gone by then, but for those that are shown
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(lines[0], shell=True, env=environment, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said
    table = rows(out / "predict.csv")
    assert {row["class"] for row in table} == {"the cat's", "the dog's", "the eel's"} and len(table) == 9
    by_image = {row["image"]: row["predicted"] for row in found}
    assert all(by_image[row["image"]] == row["class"] for row in table if row["rank"] == "1")


@pytest.mark.full
def test_the_command_for_export_runs(photographs, tune, tmp_path):
    done = tune(photographs, tmp_path / "run", "--epochs", 1)
    [line] = [line.partition(": ")[2] for line in done.out.splitlines() if "export.py" in line]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said
    names = json.loads((tmp_path / "run/model.onnx.json").read_text())["class_names"]
    assert names == ["the cat's", "the dog's", "the eel's"]


def test_a_run_keeps_its_split(tmp_path, tune, fails):
    data, out, other = pets(tmp_path), tmp_path / "run", ("SEED", 3, "TRAIN.KEEP_CHECKPOINTS", 3)
    assert tune(data, out, "--epochs", 2, opts=other).status == 0
    expected = {row["image"] for row in rows(out / "validation.csv")}
    shutil.rmtree(out / "checkpoints/epoch_0002")
    assert tune(data, out, "--resume", "auto", opts=other).status == 0
    assert {row["image"] for row in rows(out / "validation.csv")} == expected
    assert yaml.safe_load((out / "config.yaml").read_text())["TRAIN"]["EPOCHS"] == 2
    # an evaluation takes the run's seed, and a run of another is another
    last = out / "checkpoints/last"
    done = tune(data, tmp_path / "eval", "--eval", "--resume", last)
    assert done.status == 0 and "SEED is 3, as of the run that wrote" in done.out and "may have been" not in done.out
    assert {row["image"] for row in rows(tmp_path / "eval/evaluation.csv")} == expected
    done = tune(data, tmp_path / "eval", "--eval", "--resume", last, opts=("SEED", 4))
    assert done.status == 0 and "the validation images are not the 6 of the run" in done.out
    new = tmp_path / "new"
    for name in ("cat", "dog", "eel"):
        shutil.copytree(data / f"the {name}'s", new / "val" / f"the {name}'s")
    done = tune(new, tmp_path / "eval", "--eval", "--resume", last)
    assert done.status == 0 and len(rows(tmp_path / "eval/evaluation.csv")) == 36
    (new / "val/the eel's").rename(new / "val/the elk's")
    done = tune(new, tmp_path / "eval", "--eval", "--resume", last)
    assert done.status == 2 and 'class "the eel\'s" is not in the data, but of the run' in done.err
    shutil.rmtree(out / "checkpoints/epoch_0002")
    done = tune(data, out, "--resume", "auto", opts=("SEED", 4))
    assert done.status == 2 and "SEED 3 -> 4" in done.err and "labels of the training images differ" in done.err
    # class names need no data
    from analyze.impl.predict import class_names

    shutil.rmtree(data)
    assert class_names(3, out / "checkpoints/epoch_0001", None) == ["the cat's", "the dog's", "the eel's"]


def test_asked_to_stop_within_an_update(photographs, tune, tmp_path, monkeypatch, same_state):
    """The micro-steps of the update under way are given up, and made again by whoever goes on: the same bits."""
    small = ("--epochs", 1, "--batch-size", 2, "--accumulation-steps", 4)
    assert tune(photographs, tmp_path / "whole", *small).status == 0
    original, made = trainer.Trainer._micro_step, []

    def step(self, *arguments):
        made.append(arguments)
        if len(made) == 6:  # the second of the second update
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_micro_step", step)
    stopped = tune(photographs, tmp_path / "stopped", *small)
    assert stopped.status == 0 and "stopped by SIGTERM after epoch 0 and 1 updates; saved in" in stopped.out
    assert len(made) == 6
    assert tune(photographs, tmp_path / "stopped", *small, "--resume", "auto").status == 0
    # of an epoch of three updates, the first was not made again
    assert len(made) == 6 + 8
    states = [tmp_path / name / "checkpoints/epoch_0001" for name in ("whole", "stopped")]
    for state in states:
        # without an average there is none to compare
        assert not (state / "model_ema.safetensors").exists()
    one, other = (torch.load(state / "train_state.pt", weights_only=True)["optimizer"] for state in states)
    assert one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(value, other[name][key]) for name, each in one.items() for key, value in each.items())


def test_names_of_any_bytes(tmp_path, tune):
    """A name that is no UTF-8, one with the end of a line, and one of marks of Markdown, shells and paths."""
    data, classes = tmp_path / "data", (b"caf\xe9", b"new\nline", "ünï \"q\" 's' |*_`$(x)".encode())
    pets(tmp_path)
    for source, name in zip(("cat", "dog", "eel"), classes, strict=True):
        shutil.copytree(tmp_path / "my pets" / f"the {source}'s", data / os.fsdecode(name))
    out = tmp_path / "run"
    done = tune(data, out, "--epochs", 1)
    assert done.status == 0, done
    assert "  caf\\xe9: 10 + 2\n  new\\nline: 10 + 2\n" in done.out
    assert len(rows(out / "split.csv")) == 36 and len(rows(out / "validation.csv")) == 6
    assert "| new\\\\nline | 2 |" in (out / "report.md").read_text()
    (named,) = [line for line in done.out.splitlines() if "analyze/predict.py" in line]
    assert "ünï" in named and "caf" not in named and "new" not in named
    assert tune(data, out, "--resume", "auto").status == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_begin_with_published_weights(family):
    cfg = load_config(str(recipe(family)))
    entry = find(cfg.MODEL.PRETRAINED)
    assert entry.model == cfg.MODEL.NAME and cfg.MODEL.NAME.startswith(family) and cfg.MODEL.NEW_HEAD
    size = timm.get_pretrained_cfg(cfg.MODEL.NAME).input_size[1]
    assert (size, "photos", f"runs/finetune_{family}") == (cfg.DATA.IMG_SIZE, cfg.DATA.DATASET, cfg.OUTPUT)
    assert None is cfg.TRAIN.EPOCHS is cfg.TRAIN.WARMUP_EPOCHS is cfg.DATA.BATCH_SIZE is cfg.MODEL.NUM_CLASSES


def test_without_the_network_the_ways_out_are_named(photographs, fails, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    common = ("--data-path", photographs, "--output", tmp_path / "run", "--batch-size", 2)
    parts = ("vmamba_tiny_s1l8.in1k is not here, and HF_HUB_OFFLINE is set", "--pretrained FILE", "--from-scratch")
    fails(*common, parts=parts, cfg=recipe("vmamba"))
    assert not (tmp_path / "run").exists()


def test_weights_of_a_config_and_of_the_command_line(photographs, tune, tmp_path):
    assert tune(photographs, tmp_path / "a", "--epochs", 1).status == 0
    weights = tmp_path / "a/checkpoints/last/model.safetensors"
    # the later of the two flags wins; the classifier is fresh
    done = tune(photographs, tmp_path / "b", "--epochs", 1, "--pretrained", weights)
    assert done.status == 0 and f"weights from {weights}; fresh classifier" in done.out
    assert yaml.safe_load((tmp_path / "b/config.yaml").read_text())["MODEL"]["PRETRAINED"] == str(weights)


def test_flags_reach_the_schedule(photographs, tune, tmp_path, read_log):
    out = tmp_path / "run"
    assert tune(photographs, out, "--epochs", 3, "--lr", 0.02, opts=("PRINT_FREQ", 1)).status == 0
    lr = [entry["lr"] for entry in read_log(out, "train")]
    # 3 updates an epoch, one epoch of warm-up from 0; the batch does not change the rate
    assert lr[:4] == pytest.approx([0, 0.02 / 3, 0.04 / 3, 0.02]) and len(lr) == 9 and 0 < lr[-1] < 0.002
    assert lr[3:] == sorted(lr[3:], reverse=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*_digits*.yaml")), ids=lambda path: path.stem)
def test_the_cosine_of_the_digits_ends_where_training_ends(path):
    cfg = load_config(str(path))
    rates = resolve_rates(cfg.TRAIN, cfg.DATA.BATCH_SIZE)
    optimizer = build_optimizer(build_model(cfg), cfg.TRAIN, rates.base)
    updates = 22
    schedule = build_schedule(optimizer, cfg.TRAIN, rates, updates)

    def rate(number: int) -> float:
        schedule.set(number)
        return optimizer.param_groups[0]["lr"]

    last = cfg.TRAIN.EPOCHS * updates
    assert rate(last) == rates.minimum < rate(last - 1) < 1.01 * rates.minimum + 1e-4 * rates.base
    assert max(map(rate, range(last))) == pytest.approx(rates.base)


def test_answers_by_class():
    found = [Answer(0, 0, 0, 0.9, 0.1), Answer(1, 0, 1, 0.8, 2.0), Answer(2, 1, 1, 0.7, 0.3), Answer(3, 0, 1, 0.5, 1.0)]
    counts = by_class(found, 3)
    assert counts[0] == (3, 1, ((1, 2),)) and counts[1] == (1, 1, ()) and counts[2] == (0, 0, ())
    assert [answer.index for answer in answers.worst(found, 2)] == [1, 3]
    undefined = Answer(4, 0, 0, math.nan, math.nan)
    assert answers.worst([*found, undefined], 1) == [undefined]
    assert summary_line(found, ["cat", "dog", "eel"]) == "cat 33.3% of 3, dog 100.0% of 1"


def test_devices(monkeypatch):
    mps = torch.backends.mps
    monkeypatch.setattr(mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device mps: this PyTorch sees no GPU of Apple's; use --device cpu"):
        chosen_device("mps")
    monkeypatch.setattr(mps, "is_available", lambda: True)
    assert chosen_device("mps").type == "mps" and chosen_device("cpu").type == "cpu"
    # only who asks for it gets it: nobody has run it yet
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("").type == "cpu"
    assert World(0, 1, torch.device("mps")).wide == torch.float32
    assert World(0, 1, torch.device("cpu")).wide == torch.float64
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes cannot share"), distributed.joined_world("mps"):
        pass
