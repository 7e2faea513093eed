"""Checkpoints: exact continuation, whole or absent, the newest valid one, a full disk, other models."""

import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm_train.common.errors import UserError
from ssm_train.record.checkpoint import Position, read_checkpoint
from ssm_train.record.store import CheckpointStore

from ..run_meta import META

# everything random that training has, so that a resumed run must find each stream again
RANDOM = ["AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0", "AUG.REPROB", "0.5", "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"]
RANDOM += ["AUG.HFLIP", "0.5", "MODEL.DROP_PATH_RATE", "0.3", "TRAIN.EPOCHS", "4", "TRAIN.KEEP_CHECKPOINTS", "9"]


def contents(folder: Path) -> dict[str, str | bytes]:
    """Links and files below a folder, with what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.name] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, Path]:
    """Finished runs by name, made by the first test that needs them."""
    return {"root": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def full_run(cli, shared) -> Path:
    """A run of 4 epochs, with all its checkpoints. Read-only."""
    if "full" not in shared:
        shared["full"] = shared["root"] / "full"
        assert cli("--output", shared["full"], "--opts", *RANDOM).status == 0
    return shared["full"]


@pytest.mark.parametrize("workers", [0, 2])
def test_four_epochs_equal_two_and_two(cli, full_run, read_log, same_state, tmp_path, workers):
    for name in ("epoch_0001", "epoch_0002"):
        shutil.copytree(full_run / "checkpoints" / name, tmp_path / "checkpoints" / name)
    outcome = cli("--output", tmp_path, "--resume", "auto", "--opts", *RANDOM, "DATA.NUM_WORKERS", workers)
    assert outcome.status == 0 and "resumed after epoch 2" in outcome.out
    same_state(full_run / "checkpoints/last", tmp_path / "checkpoints/last")
    one, other = (json.loads((run / "metrics.json").read_text()) for run in (full_run, tmp_path))
    assert one["results"] == other["results"] and one["top1"] == other["top1"]
    losses = [[entry["loss"] for entry in read_log(run, "train")] for run in (full_run, tmp_path)]
    assert losses[0][10:] == losses[1]


def test_fp16_state_is_continued(cli, state_of, same_state, tmp_path):
    options = ["--amp", "fp16", "--opts", "TRAIN.EPOCHS", "3", "TRAIN.KEEP_CHECKPOINTS", "3"]
    assert cli("--output", tmp_path / "a", *options).status == 0
    shutil.copytree(tmp_path / "a/checkpoints/epoch_0001", tmp_path / "b/checkpoints/epoch_0001")
    assert cli("--output", tmp_path / "b", "--resume", "auto", *options).status == 0
    assert "scaler/scale" in state_of(tmp_path / "a/checkpoints/last")
    same_state(tmp_path / "a/checkpoints/last", tmp_path / "b/checkpoints/last")


def test_a_checkpoint_is_data(full_run):
    folder = full_run / "checkpoints/epoch_0004"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "model_ema.safetensors", "train_state.pt", "meta.json", "SHA256SUMS",
    }  # fmt: skip
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["epoch"] == 4 and meta["results"]["last"]["epoch"] == 4
    assert "NAME: vmamba_nano" in meta["config"] and "torch" in meta["versions"]
    for epoch in range(1, 5):
        # the results in a checkpoint include its own epoch: it is saved after validation
        results = json.loads((full_run / f"checkpoints/epoch_000{epoch}/meta.json").read_text())["results"]
        assert results["last"]["epoch"] == results["last_ema"]["epoch"] == epoch
    best = json.loads((full_run / "metrics.json").read_text())["results"]
    links = {name: os.readlink(full_run / "checkpoints" / name) for name in ("last", "best", "best_ema")}
    assert links == {
        "last": "epoch_0004",
        "best": f"epoch_{best['best']['epoch']:04d}",
        "best_ema": f"epoch_{best['best_ema']['epoch']:04d}",
    }


def test_old_checkpoints_go_linked_ones_stay(tmp_path):
    model, store = torch.nn.Linear(2, 2), CheckpointStore(tmp_path, keep=2)
    for epoch in range(1, 8):
        store.save(Position(epoch), model=model.state_dict(), ema=None, train_state={}, meta=META)
        store.link({"last": Position(epoch), "best": Position(min(epoch, 2)), "best_ema": Position(min(epoch, 6))})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best", "best_ema", "epoch_0002", "epoch_0006", "epoch_0007", "last",
    ]  # fmt: skip
    assert (tmp_path / "best").resolve().name == "epoch_0002"
    # what a killed process left is not a checkpoint, and goes
    (tmp_path / ".tmp-epoch_0008").mkdir()
    (tmp_path / ".old-epoch_0007").mkdir()
    (tmp_path / ".tmp-1-last").symlink_to("epoch_0007")
    assert list(store.positions()) == [Position(2), Position(6), Position(7)]
    store.clean()
    assert len(list(tmp_path.iterdir())) == 6
    # a folder of that epoch gives way to the new one
    with torch.no_grad():
        model.weight.fill_(3)
    store.save(Position(7), model=model.state_dict(), ema=None, train_state={}, meta=META)
    assert load_file(tmp_path / "last/model.safetensors")["weight"].unique().tolist() == [3.0]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    "file", ["model.safetensors", "model_ema.safetensors", "train_state.pt", "meta.json", "SHA256SUMS"]
)
def test_damage_is_noticed(full_run, tmp_path, file):
    copy = tmp_path / "epoch_0004"
    shutil.copytree(full_run / "checkpoints/epoch_0004", copy)
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / file).write_bytes(bytes(data))
    with pytest.raises(UserError, match="epoch_0004 is damaged|no complete checkpoint"):
        read_checkpoint(copy)
    (copy / file).write_bytes(b"")
    with pytest.raises(UserError, match="epoch_0004 is damaged"):
        read_checkpoint(copy)
    (copy / file).unlink()
    with pytest.raises(UserError, match="epoch_0004 is no complete checkpoint"):
        read_checkpoint(copy)


def test_no_corruption_at_random_offsets_is_taken_as_valid(full_run, tmp_path):
    """200 of them: single bits, cut ends, added bytes, swapped files."""
    copy = tmp_path / "epoch_0004"
    shutil.copytree(full_run / "checkpoints/epoch_0004", copy)
    files = sorted(copy.iterdir())
    chance = random.Random(0)
    for number in range(200):
        path = files[number % len(files)]
        data = path.read_bytes()
        at = chance.randrange(len(data))
        kinds = (
            data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :],
            data[:at],
            data + b"\n",
            chance.choice([other for other in files if other != path]).read_bytes(),
        )
        path.write_bytes(kinds[number // len(files) % len(kinds)])
        with pytest.raises(UserError, match="epoch_0004 is (damaged|no complete checkpoint)"):
            read_checkpoint(copy)
        path.write_bytes(data)
    assert read_checkpoint(copy).meta["epoch"] == 4


def test_auto_resume_skips_damaged_and_incomplete_ones(cli, full_run, same_state, tmp_path):
    for epoch in (1, 2, 3):
        shutil.copytree(full_run / f"checkpoints/epoch_000{epoch}", tmp_path / f"checkpoints/epoch_000{epoch}")
    (tmp_path / "checkpoints/epoch_0003/model.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoints/epoch_0004").mkdir()
    (tmp_path / "checkpoints/.tmp-epoch_0005").mkdir()
    outcome = cli("--output", tmp_path, "--resume", "auto", "--opts", *RANDOM)
    assert outcome.status == 0 and "resumed after epoch 2" in outcome.out
    assert "skipping a damaged checkpoint" in outcome.out and "epoch_0003 is damaged (model.safetensors" in outcome.out
    assert "epoch_0004 is no complete checkpoint" in outcome.out
    same_state(full_run / "checkpoints/last", tmp_path / "checkpoints/last")
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_auto_resume_of_nothing_starts_from_scratch(cli, tmp_path):
    outcome = cli("--output", tmp_path / "new", "--resume", "auto")
    assert outcome.status == 0 and "holds no run, starting from scratch" in outcome.out
    # and of a finished run: nothing to do, the metrics are written again
    before = contents(tmp_path / "new/checkpoints")
    (tmp_path / "new/metrics.json").unlink()
    assert cli("--output", tmp_path / "new", "--resume", "auto").status == 0
    assert contents(tmp_path / "new/checkpoints") == before and (tmp_path / "new/metrics.json").exists()


def test_full_disk_loses_nothing(cli, fails, tmp_path):
    """A file-size limit makes write() fail as a full disk does, in the middle of a checkpoint."""
    one, two = (["--output", tmp_path, "--opts", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.EPOCHS", n] for n in ("1", "2"))
    assert cli(*one).status == 0
    before = contents(tmp_path / "checkpoints")
    smallest = min(len(data) for name, data in before.items() if name.endswith(".safetensors"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (smallest - 1000, hard))
        line = fails(
            "--resume", "auto", "--allow-changes", *two, parts=("no room left to save epoch_0002", "--resume auto")
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "checkpoints") in line and "up to epoch 1, are intact" in line
    assert contents(tmp_path / "checkpoints") == before
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs"] == 1
    outcome = cli("--resume", "auto", "--allow-changes", *two)
    assert outcome.status == 0 and "resumed after epoch 1" in outcome.out
    assert os.readlink(tmp_path / "checkpoints/last") == "epoch_0002"


def test_resume_refuses_what_would_lose_or_mix(fails, cli, full_run, same_state, tmp_path):
    out = ["--output", tmp_path / "new", "--resume", full_run / "checkpoints/best", "--opts", *RANDOM]
    fails(*out, "MODEL.NUM_CLASSES", 4, parts=("of another model", "MODEL.NUM_CLASSES: 3 -> 4"))
    fails(*out, "MODEL.KWARGS.dims", 16, parts=("of another model", "MODEL.KWARGS.dims: 8 -> 16"))
    fails(*out, "MODEL.NAME", "resnet10t", parts=("of another model", "MODEL.NAME: 'vmamba_nano' -> 'resnet10t'"))
    assert not (tmp_path / "new").exists()
    back = full_run / "checkpoints/epoch_0001"
    fails("--output", full_run, "--resume", back, "--opts", *RANDOM, parts=("goes on to epoch 4", "--tag"))
    for wrong in (tmp_path / "nowhere", full_run):
        fails("--output", tmp_path / "new", "--resume", wrong, parts=(str(wrong), "checkpoint"))
    assert cli("--output", tmp_path / "other").status == 0
    fails("--output", tmp_path / "other", "--resume", back, "--opts", *RANDOM, parts=("already holds a run", "--tag"))
    # a branch into a folder of its own is fine, and that folder is complete: it holds what it started from
    branch = tmp_path / "branch"
    assert cli("--output", branch, "--resume", back, "--opts", *RANDOM).status == 0
    metrics = json.loads((branch / "metrics.json").read_text())
    assert (branch / metrics["checkpoint"]).is_file()
    assert sorted(path.name for path in (branch / "checkpoints").glob("epoch_*")) == [
        f"epoch_000{n}" for n in (1, 2, 3, 4)
    ]
    same_state(full_run / "checkpoints/last", branch / "checkpoints/last")
    # what a kill between saving and linking leaves is put right
    before = contents(branch / "checkpoints")
    (branch / "checkpoints/last").unlink()
    (branch / "checkpoints/best").unlink()
    (branch / "checkpoints/best").symlink_to("epoch_0009")
    assert cli("--output", branch, "--resume", "auto", "--opts", *RANDOM).status == 0
    assert contents(branch / "checkpoints") == before


def test_eval_and_pretrained(cli, fails, full_run, tmp_path):
    metrics = json.loads((full_run / "metrics.json").read_text())
    last = metrics["results"]["last"], metrics["results"]["last_ema"]

    def values(record: dict) -> list[float]:
        return [record[key] for key in ("top1", "top5", "loss", "images")]

    # --resume: both kinds of weights, the numbers of training again, nothing else in the folder
    opts = ["--opts", *RANDOM]
    assert cli("--eval", "--resume", full_run / "checkpoints/last", "--output", tmp_path / "e", *opts).status == 0
    found = json.loads((tmp_path / "e/metrics.json").read_text())
    assert found["mode"] == "eval" and found["eval"]["top1"] == found["top1"]
    assert values(found["results"]["model"]) == values(last[0])
    assert values(found["results"]["model_ema"]) == values(last[1])
    tables = {"evaluation.csv", "evaluation_confusion.csv"}
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"metrics.json", "log.txt", ".lock", *tables}
    # --pretrained: a file, or both kinds of a folder's weights; of a run's, those of its best checkpoint
    for number, record in enumerate(last):
        file = full_run / "checkpoints/last" / ("model.safetensors", "model_ema.safetensors")[number]
        out = tmp_path / f"p{number}"
        assert cli("--eval", "--pretrained", file, "--output", out, *opts).status == 0
        assert values(json.loads((out / "metrics.json").read_text())["results"]["model"]) == values(record)
    assert cli("--eval", "--pretrained", full_run / "checkpoints/last", "--output", tmp_path / "f", *opts).status == 0
    found = json.loads((tmp_path / "f/metrics.json").read_text())["results"]
    assert values(found["model"]) == values(last[0]) and values(found["model_ema"]) == values(last[1])
    for option in ("--pretrained", "--resume"):
        assert cli("--eval", option, full_run, "--output", tmp_path / option, *opts).status == 0
        found = json.loads((tmp_path / option / "metrics.json").read_text())["results"]["model"]
        assert values(found) == values(metrics["results"]["best"])
    # in the folder of a training run the run's own numbers stay
    shutil.copytree(full_run, tmp_path / "copy", symlinks=True)
    assert cli("--eval", "--resume", "auto", "--output", tmp_path / "copy", *opts).status == 0
    merged = json.loads((tmp_path / "copy/metrics.json").read_text())
    assert merged.pop("eval")["mode"] == "eval" and merged == metrics
    # training from given weights starts at them, average included
    start = full_run / "checkpoints/last/model.safetensors"
    still = ["--opts", "TRAIN.BASE_LR", 0, "TRAIN.WARMUP_LR", 0, "TRAIN.MIN_LR", 0]
    assert cli("--pretrained", start, "--output", tmp_path / "t", *still).status == 0
    for name in ("model", "model_ema"):
        for key, value in load_file(tmp_path / f"t/checkpoints/last/{name}.safetensors").items():
            torch.testing.assert_close(value, load_file(start)[key])
    # of other classes only when asked for: all but the classifier then starts at them
    other = {n: torch.cat([v, v]) if n.startswith("classifier.head.") else v for n, v in load_file(start).items()}
    save_file(other, tmp_path / "other.safetensors")
    begin = ["--pretrained", tmp_path / "other.safetensors", "--output", tmp_path / "h"]
    fails(*begin, parts=("classifier.head.weight", "; --new-head keeps the model's own classifier"))
    fails("--new-head", "--output", tmp_path / "h", parts=("--new-head goes with --pretrained",))
    assert cli(*begin, "--new-head", *still).status == 0
    for key, value in load_file(tmp_path / "h/checkpoints/last/model.safetensors").items():
        if key.startswith("classifier.head."):
            assert value.shape == load_file(start)[key].shape and not torch.equal(value, load_file(start)[key])
        else:
            torch.testing.assert_close(value, other[key])
    # weights of another model, and files that are none
    wrong = ["--pretrained", start, "--output", tmp_path / "w", "--opts", "MODEL.KWARGS.dims", 16]
    fails(*wrong, parts=(str(start), "patch_embed.0.weight"))
    (tmp_path / "text.pth").write_text("no weights")
    fails("--pretrained", tmp_path / "text.pth", "--output", tmp_path / "w", parts=("text.pth",))
    fails("--pretrained", tmp_path / "none.pth", "--output", tmp_path / "w", parts=("none.pth",))
    fails("--eval", "--output", tmp_path / "w", parts=("--eval needs weights",))
    fails("--eval", "--resume", "auto", "--output", tmp_path / "w", parts=("no valid checkpoint to evaluate",))
    assert not (tmp_path / "w").exists()
