"""Losses and gradients that are not finite: skipped on all ranks, counted, written down, rolled back, given up."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ssm_train import trainer
from ssm_train.common.errors import UserError
from ssm_train.record.checkpoint import Position
from ssm_train.record.guard import Guard

OPTIONS = ["--opts", "TRAIN.SAVE_UPDATES", 2, "TRAIN.KEEP_CHECKPOINTS", 99, "TRAIN.MAX_NONFINITE", 1]


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps, how): the losses of these micro-steps (counted from 0 over the run) become `how` of themselves."""

    def install(steps: set[int], how) -> list[int]:
        seen = []
        original = trainer.training_loss

        def loss(*args, **kwargs):
            value = original(*args, **kwargs)
            seen.append(len(seen))
            return how(value) if seen[-1] in steps else value

        monkeypatch.setattr(trainer, "training_loss", loss)
        return seen

    return install


def test_a_bad_update_moves_nothing(cli, read_log, spoil, tmp_path):
    """Loss and weights are those of a run that never saw this batch; the data go on."""
    spoil({3}, lambda loss: loss * math.nan)
    outcome = cli("--output", tmp_path, *OPTIONS)
    assert outcome.status == 0 and "update 4 of epoch 1 skipped: loss nan" in outcome.out
    entries = read_log(tmp_path, "train")
    # the fourth slot made no update: its number stays, and the rate with it
    assert [entry["update"] for entry in entries] == [1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert entries[4]["lr"] == entries[3]["lr"] and entries[3]["loss"] is None
    [_, event] = read_log(tmp_path, "event")
    assert (event["what"], event["epoch"], event["slot"]) == ("skipped", 0, 3)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["skipped_updates"], metrics["rollbacks"]) == (1, 0)
    for file in ("model", "model_ema"):
        assert all(v.isfinite().all() for v in load_file(tmp_path / f"checkpoints/last/{file}.safetensors").values())
    # no checkpoint in the middle of trouble
    assert not (tmp_path / "checkpoints" / Position(0, 4).name).exists()
    assert (tmp_path / "checkpoints" / Position(0, 2).name).exists()
    dump = json.loads((tmp_path / "nonfinite/epoch_0000_update_000004_rank0.json").read_text())
    [step] = dump["micro_steps"]
    assert (dump["epoch"], dump["slot"], step["loss"], step["seed"]) == (0, 3, "nan", [0, 3, 0])
    assert len(step["images"]) == 4 and all(name.endswith(".png") for name in step["images"])
    assert [key[0] for key in step["keys"]] == [0] * 4


@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_gradient_or_loss_alone(cli, spoil, read_log, tmp_path, how):
    """A finite loss with an infinite gradient, and an infinite loss with a finite gradient."""
    ways = {
        "gradient": Spike.apply,
        "loss": lambda loss: loss + math.inf,
    }
    spoil({1}, ways[how])
    assert cli("--output", tmp_path, *OPTIONS).status == 0
    assert [event["what"] for event in read_log(tmp_path, "event")] == ["started", "skipped"]
    assert [entry["update"] for entry in read_log(tmp_path, "train")][:3] == [1, 1, 2]


class Spike(torch.autograd.Function):
    """The identity with an infinite derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_running_statistics_do_not_move(cli, tiny_cfg, read_log, state_of, tmp_path, monkeypatch):
    """Batch norm has seen the bad images by the time the loss is known."""
    original, seen = trainer.training_loss, []

    def loss(run, images, targets, **kwargs):
        seen.append(1)
        return original(run, images * (math.inf if len(seen) == 4 else 1), targets, **kwargs)

    monkeypatch.setattr(trainer, "training_loss", loss)
    config = yaml.safe_load(tiny_cfg.read_text())
    config["MODEL"] = {"NAME": "test_resnet", "NUM_CLASSES": 3}
    file = tmp_path / "resnet.yaml"
    file.write_text(yaml.safe_dump(config))
    assert cli("--output", tmp_path / "run", *OPTIONS, cfg=file).status == 0
    assert [event["what"] for event in read_log(tmp_path / "run", "event")] == ["started", "skipped"]
    end = state_of(tmp_path / "run/checkpoints/last")
    assert all(value.isfinite().all() for value in end.values())
    assert end["model/bn1.num_batches_tracked"] == end["model_ema/bn1.num_batches_tracked"] == 9


def test_roll_back_and_go_on(cli, spoil, read_log, state_of, tmp_path):
    """Two in a row, where one is allowed: back to the last checkpoint, with the data going on."""
    spoil({3, 4}, lambda loss: loss * math.nan)
    outcome = cli("--output", tmp_path, *OPTIONS)
    assert outcome.status == 0, outcome
    assert [event["what"] for event in read_log(tmp_path, "event")] == ["started", "skipped", "skipped", "rolled_back"]
    assert read_log(tmp_path, "event")[3]["to"] == "epoch_0000_update_000002"
    # 3 updates before, 2 skipped, back to 2, then the 5 of the second epoch
    assert [entry["update"] for entry in read_log(tmp_path, "train")] == [1, 2, 3, 3, 2, 3, 4, 5, 6, 7]
    back, end = (state_of(tmp_path / "checkpoints" / name) for name in ("epoch_0000_update_000002", "epoch_0001"))
    for name, value in back.items():
        assert torch.equal(value, end[name]), name
    assert json.loads((tmp_path / "metrics.json").read_text())["rollbacks"] == 1


def test_giving_up(fails, spoil, tmp_path):
    spoil(set(range(2, 99)), lambda loss: loss * math.nan)
    options = [*OPTIONS, "TRAIN.MAX_ROLLBACKS", 1]
    line = fails("--output", tmp_path / "a", *options, parts=("2 updates in a row were not finite, after 1 roll-back",))
    assert "TRAIN.BASE_LR" in line and "--resume auto" in line
    # what is saved after a roll-back, or after a skipped update at the end of an epoch, are the weights before
    names = sorted(path.name for path in (tmp_path / "a/checkpoints").glob("epoch*"))
    assert names == ["epoch_0000_update_000002", "epoch_0000_update_000004", "epoch_0001"]
    for name in ("model", "model_ema"):
        one, *others = (load_file(tmp_path / "a/checkpoints" / folder / f"{name}.safetensors") for folder in names)
        for other in others:
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_before_the_first_epoch_the_start_is_rolled_back_to(fails, spoil, read_log, tmp_path):
    spoil(set(range(99)), lambda loss: loss * math.nan)
    fails("--output", tmp_path / "a", *OPTIONS, parts=("after 3 roll-back(s)", "TRAIN.BASE_LR"))
    back = [entry["to"] for entry in read_log(tmp_path / "a", "event") if entry["what"] == "rolled_back"]
    assert len(back) == 3 and back[0] == "epoch_0000"


def test_nothing_to_roll_back_to(fails, spoil, tmp_path, monkeypatch):
    spoil(set(range(99)), lambda loss: loss * math.nan)
    monkeypatch.setattr("ssm_train.record.store.CheckpointStore.newest_valid", lambda store: None)
    fails("--output", tmp_path / "a", *OPTIONS, parts=("no checkpoint in", "is as it was written", "TRAIN.BASE_LR"))


def test_counts():
    guard = Guard(max_in_a_row=2, max_rollbacks=1)
    assert [guard.skip() for _ in range(3)] == [False, False, True]
    assert guard.state() == {"skipped": 3, "in_a_row": 0, "rollbacks": 1}
    guard.skip()
    guard.made()
    assert guard.in_a_row == 0 and guard.skipped == 4
    other = Guard(2, 1)
    other.load(guard.state())
    assert other == guard
    assert [other.skip() for _ in range(2)] == [False, False]
    with pytest.raises(UserError, match="after 1 roll-back"):
        other.skip()


SPOILED_RANK = """
import os, sys
from ssm_train import trainer
from ssm_train.cli import main

original, seen = trainer.training_loss, []

def loss(*args, **kwargs):
    value = original(*args, **kwargs)
    seen.append(1)
    return value + float("inf") if os.environ["RANK"] == "1" and len(seen) == 3 else value

trainer.training_loss = loss
sys.exit(main())
"""


def test_all_ranks_skip_together(torchrun, tiny_cfg, read_log, tmp_path):
    """The loss of one rank alone is infinite, its gradient finite: nobody steps, and all write down their batches."""
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED_RANK)
    done = torchrun(2, "--cfg", tiny_cfg, "--batch-size", 2, "--output", tmp_path / "run", *OPTIONS, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [entry["update"] for entry in read_log(tmp_path / "run", "train")] == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9]
    dumps = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/nonfinite").iterdir())]
    assert [dump["micro_steps"][0]["seed"] for dump in dumps] == [[0, 2, 0], [0, 2, 1]]
    assert math.isfinite(float(dumps[0]["micro_steps"][0]["loss"])) and dumps[1]["micro_steps"][0]["loss"] == "inf"
    images = [name for dump in dumps for name in dump["micro_steps"][0]["images"]]
    assert len(set(images)) == 4
