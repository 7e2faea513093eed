"""What a run writes while it goes: log.jsonl, summary.csv, TensorBoard, Weights & Biases, and the progress bar."""

import csv
import errno
import io
import json
import logging
import math
import re
import sys
import types
from pathlib import Path

import pytest
import termcolor
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssm_train.common import fileio, machine
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.preemption import Preempted
from ssm_train.config.defaults import default_config
from ssm_train.record import progress
from ssm_train.record.logger import RunLog
from ssm_train.record.progress import Progress
from ssm_train.record.series import entries_until, read_entries, train_means

MAIN, OTHER = World(0, 2, torch.device("cpu")), World(1, 2, torch.device("cpu"))


def train_values(epoch, iteration, loss=1.0, speed=100.0, wait=0.0):
    return {
        "epoch": epoch,
        "iteration": iteration,
        "loss": loss,
        "lr": 0.001 * iteration,
        "grad_norm": 2.0,
        "images_per_second": speed,
        "data_wait": wait,
        "memory_mb": 10.0,
        "eta_seconds": 3661.0,
    }


def val_values(epoch, **more):
    return {"epoch": epoch, "top1": 50.0 + epoch, "top5": 90.0, "loss": 0.5, "images": 8, "excluded": 0, **more}


@pytest.fixture
def folder(tmp_path):
    cfg = default_config()
    cfg.TRAIN.EPOCHS = 3
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return tmp_path


def rows(folder):
    return list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))


def test_record(folder):
    with RunLog(True) as log:
        log.open_series(folder, 0)
        log.record("train", 1, train_values(1, 1, loss=math.nan))
        log.record("event", 1, {"what": "skipped", "slot": 4, "grad_norm": "inf"})
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert entries[0]["loss"] is None and entries[0]["grad_norm"] == 2.0
    assert entries[1] == {"kind": "event", "update": 1, "what": "skipped", "slot": 4, "grad_norm": "inf"}
    board = EventAccumulator(str(folder)).Reload()
    tags = set(board.Tags()["scalars"])
    assert {"train/grad_norm", "event/slot"} <= tags and not {"train/loss", "event/what", "event/grad_norm"} & tags
    assert [(event.step, event.value) for event in board.Scalars("event/slot")] == [(1, 4.0)]


def test_other_ranks_write_nothing(folder):
    before = set(folder.iterdir())
    with RunLog(False, "project") as log:
        log.open_text(folder)
        log.open_series(folder, 0)
        log.record("train", 1, train_values(1, 1))
    assert set(folder.iterdir()) == before


def test_summary(folder):
    with RunLog(True) as log:
        log.open_series(folder, 0)
        # 10 iterations at 100 images/s, then 5 at 50: the same time each
        log.record("train", 10, train_values(1, 10, loss=4.0, speed=100.0, wait=0.1))
        log.record("train", 15, train_values(1, 15, loss=1.0, speed=50.0, wait=0.3))
        log.record("val", 15, val_values(1, ema_top1=60.0, ema_top5=95.0, ema_loss=0.25, seconds=12.5))
        log.record("train", 25, train_values(2, 10, loss=math.inf))
        assert [row["epoch"] for row in rows(folder)] == ["1"]
        log.record("val", 30, val_values(2))
    first, second = rows(folder)
    assert list(first) == [
        *("epoch", "update", "lr", "train_loss", "top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss"),
        *("images_per_second", "data_wait", "seconds"),
    ]
    expected = {"epoch": 1, "update": 15, "lr": 0.015, "train_loss": 3.0, "top1": 51.0, "top5": 90.0, "loss": 0.5}
    expected |= {"ema_top1": 60.0, "ema_top5": 95.0, "ema_loss": 0.25}
    expected |= {"images_per_second": 75.0, "data_wait": 0.2, "seconds": 12.5}
    assert {name: float(value) for name, value in first.items()} == pytest.approx(expected)
    assert (second["train_loss"], second["ema_top1"], second["seconds"]) == ("", "", "")
    assert (second["epoch"], second["top1"], float(second["images_per_second"])) == ("2", "52.0", pytest.approx(100.0))


def test_train_means():
    assert train_means([]) == {"train_loss": None, "images_per_second": None, "data_wait": None}
    # over two epochs; the repeated iteration counts once, as it was the last time
    entries = [train_values(1, 2, 8.0), train_values(1, 2, 2.0), train_values(1, 3, 5.0), train_values(2, 3, 1.0)]
    assert train_means(entries)["train_loss"] == pytest.approx((2 * 2 + 1 * 5 + 3 * 1) / 6)


def test_summary_is_never_half_written(folder, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    with RunLog(True) as log:
        log.open_series(folder, 0)
        log.record("val", 1, val_values(1))
        before = (folder / "summary.csv").read_text()
        monkeypatch.setattr(fileio.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            log.record("val", 2, val_values(2))
    assert (folder / "summary.csv").read_text() == before and len(rows(folder)) == 1


def test_full_disk_is_an_os_error(folder, monkeypatch):
    """Which main turns into one line."""

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught, RunLog(True) as log:
        log.open_series(folder, 0)
        log.record("val", 1, val_values(1))
        monkeypatch.setattr(fileio.os, "fsync", full)
        log.record("val", 2, val_values(2))
    assert fileio.is_disk_full(caught.value)
    assert [row["epoch"] for row in rows(folder)] == ["1"] and not list(folder.glob(".tmp-*"))


def test_resume_forgets_what_came_after_the_checkpoint(folder):
    """A run killed after its checkpoint of update 4, in the middle of a line, leaves the log of one never killed."""

    def go(log, updates):
        for update in updates:
            epoch, iteration = (update - 1) // 3 + 1, (update - 1) % 3 + 1
            log.record("train", update, train_values(epoch, iteration, loss=1 / update))
            if iteration == 3:
                log.record("val", update, val_values(epoch, seconds=float(update)))

    whole = folder / "whole"
    whole.mkdir()
    for target, parts in ((whole, [range(1, 10)]), (folder, [range(1, 8), range(5, 10)])):
        for updates in parts:
            with RunLog(True) as log:
                log.open_series(target, updates[0] - 1)
                go(log, updates)
            if len(parts) == 2 and updates[0] == 1:
                assert [row["epoch"] for row in rows(folder)] == ["1", "2"]
                with open(folder / "log.jsonl", "a") as file:
                    file.write('{"kind": "train", "upd')
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert (folder / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()
    steps = [[event.step for event in EventAccumulator(str(f)).Reload().Scalars("train/loss")] for f in (whole, folder)]
    assert steps[0] == steps[1] == list(range(1, 10))


def test_resume_rewrites_summary_at_once(folder):
    with RunLog(True) as log:
        log.open_series(folder, 0)
        log.record("val", 3, val_values(1))
        log.record("val", 6, val_values(2))
    with RunLog(True) as log:
        log.open_series(folder, 3)
        assert [row["epoch"] for row in rows(folder)] == ["1"]
        assert [entry["update"] for entry in read_entries(folder / "log.jsonl")] == [3]


def test_entries_until():
    def entries(*updates):
        return [{"kind": "train", "update": update} for update in updates]

    back = [{"kind": "event", "update": 2, "what": "rolled_back"}]
    assert entries_until(entries(1, 2, 3), 2) == entries(1, 2)
    assert entries_until(entries(1, 2, 3), 0) == []
    # rolled back from 5 to 2: a checkpoint of 3 is of the second time, and the first belongs to its history
    history = entries(1, 2, 3, 4, 5) + back + entries(3, 4)
    assert entries_until(history, 3) == history[:-1]
    # but the checkpoint of 2 came before all that
    assert entries_until(history, 2) == entries(1, 2)


def test_read_entries_leaves_out_broken_lines(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n{"a": \n\xff\x00\n{"a": 2}\n{"a": 3')
    assert read_entries(tmp_path / "log.jsonl") == [{"a": 1}, {"a": 2}]


class FakeRun:
    def __init__(self, arguments):
        self.arguments, self.logged, self.metrics, self.exit_code = arguments, [], [], None

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that keeps its runs."""
    module = types.ModuleType("wandb")
    module.runs = []
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **values: values

    def init(**arguments):
        module.runs.append(FakeRun(arguments))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_follows_and_a_resumed_run_continues(folder, wandb):
    with RunLog(True, "vision") as log:
        log.open_series(folder, 0)
        log.record("train", 1, train_values(1, 1, loss=math.nan))
        log.record("event", 1, {"what": "skipped", "slot": 4})
    with RunLog(True, "vision") as log:
        log.open_series(folder, 1)
    first, second = wandb.runs
    run_id = (folder / "wandb_id.txt").read_text().strip()
    assert first.arguments["id"] == second.arguments["id"] == run_id and len(run_id) == 8
    assert first.arguments["project"] == "vision" and first.arguments["resume"] == "allow"
    assert first.arguments["config"]["TRAIN"]["EPOCHS"] == 3 and first.arguments["dir"] == str(folder)
    assert first.arguments["settings"] == {"console": "off"}
    assert first.metrics == [("update", None), ("*", "update")]
    assert first.logged[0]["update"] == 1 and first.logged[0]["train/grad_norm"] == 2.0
    assert "train/loss" not in first.logged[0] and first.logged[1] == {"update": 1, "event/slot": 4}
    assert first.exit_code == 0


@pytest.mark.parametrize("error, code", [(Preempted("saved"), 0), (UserError("diverged"), 1)])
def test_wandb_learns_how_a_run_ended(folder, wandb, error, code):
    with pytest.raises(type(error)), RunLog(True, "vision") as log:
        log.open_series(folder, 0)
        raise error
    assert wandb.runs[0].exit_code == code


def test_wandb_is_not_touched_without_a_project(folder, wandb):
    with RunLog(True) as log:
        log.open_series(folder, 0)
    with RunLog(False, "vision") as log:
        log.open_series(folder, 0)
    assert wandb.runs == [] and not (folder / "wandb_id.txt").exists()


def test_wandb_missing_or_refusing(folder, wandb, monkeypatch):
    def refuse(**arguments):
        raise wandb.Error("api_key not configured")

    handlers = list(logging.getLogger("ssm_train").handlers)
    monkeypatch.setattr(wandb, "init", refuse)
    with (
        pytest.raises(UserError, match="'vision' .api_key not configured.*wandb login.*offline"),
        RunLog(True, "vision") as log,
    ):
        log.open_series(folder, 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="WANDB names the project 'vision'.*pip install wandb"):
        RunLog(True, "vision")
    assert logging.getLogger("ssm_train").handlers == handlers


def test_versions_tell_the_commit(monkeypatch, tmp_path):
    found = machine.versions()
    assert {"python", "torch", "timm"} <= set(found)
    root = Path(machine.__file__).parents[3]
    if (root / ".git").exists() and "commit" in found:
        assert len(found["commit"].removesuffix("-dirty")) == 40
    # an installed copy knows none, whatever repository may lie around it
    machine._commit.cache_clear()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "classification/machine.py"))
    assert "commit" not in machine.versions()
    machine._commit.cache_clear()


LINE = "epoch 2/3 [20/50] loss 1.5000 lr 0.02 grad 2.00 100 img/s data 7% eta 1:01:01 mem 10 MB"


@pytest.fixture
def cfg():
    cfg = default_config()
    cfg.TRAIN.EPOCHS = 3
    return cfg


@pytest.fixture
def colours(monkeypatch):
    """colours(**environment): what termcolor may know of it; None for what is not set."""

    def set_environment(**environment: str | None) -> None:
        for name in ("ANSI_COLORS_DISABLED", "NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        getattr(termcolor.termcolor.can_colorize, "cache_clear", lambda: None)()

    yield set_environment
    monkeypatch.undo()
    getattr(termcolor.termcolor.can_colorize, "cache_clear", lambda: None)()


@pytest.mark.parametrize(
    ("environment", "terminal", "coloured"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_console_is_coloured_on_a_terminal(environment, terminal, coloured, colours, tmp_path, monkeypatch):
    class Screen(io.StringIO):
        def fileno(self) -> int:
            return -7

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("os.isatty", lambda number: terminal and number == -7)
    monkeypatch.setenv("TERM", "xterm")
    colours(**environment)
    with RunLog(True) as log:
        log.open_text(tmp_path)
        logging.getLogger("ssm_train.trainer").warning("a message")
    head = r"\x1b\[32m\[[-\d]{10} [:\d]{8} ssm_train.trainer]\x1b\[0m\x1b\[33m\(test_logging.py \d+\)\x1b\[0m: WARNING "
    assert re.fullmatch(f"{head if coloured else ''}a message\n", screen.getvalue())
    assert re.fullmatch(r"[-\d]{10} [,:\d]{12} WARNING a message\n", (tmp_path / "log.txt").read_text())


def make_steps(shown, count):
    for _ in range(count):
        shown.step(4, lambda: 61.4)


def test_a_line_every_few_seconds_without_a_terminal(cfg, capsys, colours, monkeypatch):
    """Where steps are long, nobody waits for the next measurement; after one the time counts anew."""
    colours()
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with RunLog(True), Progress(MAIN, cfg) as shown:
        shown.epoch(1, 16, 0)
        passing = progress.Passing("validation", 9)
        for number in range(1, 8):
            now[0] = 100.0 + 2 * number
            make_steps(shown, 1)
            if number == 4:
                shown.show(train_values(1, 4))
            passing()
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" not in line]
    assert lines == [
        *["epoch 1/3 [3/16] 2.0 img/s eta 0:01:01", "validation [3/9]"],
        *["validation [6/9]", "epoch 1/3 [7/16] 2.0 img/s eta 0:01:01"],
    ]


def test_lines_without_a_terminal(cfg, tmp_path, capsys, colours):
    colours()
    with RunLog(True) as log, Progress(MAIN, cfg) as shown:
        log.open_text(tmp_path)
        shown.epoch(2, 50, 10)
        make_steps(shown, 10)
        shown.show(train_values(2, 20, loss=1.5, wait=0.07))
    assert capsys.readouterr().out == LINE + "\n"
    assert (tmp_path / "log.txt").read_text().endswith(f" INFO {LINE}\n")


def test_bar_on_a_terminal(cfg, tmp_path):
    out = io.StringIO()
    before = sys.stdout
    with RunLog(True) as log, Progress(MAIN, cfg, Console(file=out, force_terminal=True, width=120)) as shown:
        log.open_text(tmp_path)
        shown.epoch(2, 50, 10)
        make_steps(shown, 10)
        shown.show(train_values(2, 20, loss=1.5, wait=0.07))
        drawn = out.getvalue()
        assert "20/50" in drawn and "epoch 2/3" in drawn and "loss 1.5000 100 img/s data 7% eta 1:01:01" in drawn
        # the bar shows it already
        assert LINE not in drawn
        logging.getLogger("ssm_train.test").warning("a [bold]message[/bold]")
        above, _, below = out.getvalue()[len(drawn) :].partition("a [bold]message[/bold]")
        # the bar's line is erased, the message has its own line, and the bar comes again below
        assert above.endswith("\x1b[2K") and below.startswith("\n") and "20/50" in below
    assert sys.stdout is before
    # erased, and the cursor is back
    assert out.getvalue().rstrip().endswith("\x1b[2K") and "\x1b[?25h" in out.getvalue()
    log_text = (tmp_path / "log.txt").read_text()
    assert LINE in log_text and "a [bold]message[/bold]" in log_text and "\x1b" not in log_text


def test_bar_is_drawn_ten_times_a_second_at_most(cfg, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(MAIN, cfg, Console(file=io.StringIO(), force_terminal=True)) as shown:
        shown.epoch(1, 100, 0)
        drawn = []
        monkeypatch.setattr(shown._bar, "refresh", lambda: drawn.append(shown._done))
        for step in range(1, 101):
            now[0] = 100.0 + step / 64
            make_steps(shown, 1)
    # one every 0.1 s is every seventh step of 1/64 s; and the last one of the epoch
    assert drawn == [*range(1, 100, 7), 100]


def test_bar_leaves_the_terminal_in_order_after_an_error(cfg):
    out, before = io.StringIO(), sys.stdout
    with pytest.raises(UserError), Progress(MAIN, cfg, Console(file=out, force_terminal=True)) as shown:
        shown.epoch(1, 10, 0)
        raise UserError("stop")
    assert sys.stdout is before and "\x1b[?25h" in out.getvalue()


def test_other_ranks_show_nothing(cfg, capsys):
    out = io.StringIO()
    with RunLog(False), Progress(OTHER, cfg, Console(file=out, force_terminal=True)) as shown:
        shown.epoch(1, 10, 0)
        make_steps(shown, 1)
        shown.show(train_values(1, 1))
    assert out.getvalue() == "" and capsys.readouterr().out == ""
