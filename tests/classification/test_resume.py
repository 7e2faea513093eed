"""N updates equal k, a stop, and N - k, bit for bit: inside an epoch, and with several processes."""

import json
import shutil

import pytest
import yaml

from ssm_train.record.checkpoint import Position

# everything random that training has, so that a resumed run must find each stream again; saving every 2 of 5 updates
RANDOM = ["AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0", "AUG.REPROB", "0.5", "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"]
RANDOM += ["AUG.HFLIP", "0.5", "MODEL.DROP_PATH_RATE", "0.3", "TRAIN.KEEP_CHECKPOINTS", "99", "TRAIN.SAVE_UPDATES", "2"]


def test_positions_name_their_folders():
    assert Position(7).name == "epoch_0007" and Position(7, 500).name == "epoch_0007_update_000500"
    assert Position(7) < Position(7, 1) < Position(8)
    assert str(Position(3)) == "epoch 3" and str(Position(0, 2)) == "epoch 0 and 2 updates"


@pytest.mark.parametrize(
    "start, options",
    [
        ("epoch_0000_update_000002", []),
        ("epoch_0000_update_000004", ["--amp", "fp16"]),
        ("epoch_0001_update_000002", ["--channels-last"]),
    ],
)
def test_inside_an_epoch(cli, read_log, same_state, tmp_path, start, options):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert cli("--output", whole, *options, "--opts", *RANDOM).status == 0
    names = sorted(path.name for path in (whole / "checkpoints").glob("epoch_*"))
    assert names == [
        "epoch_0000_update_000002", "epoch_0000_update_000004", "epoch_0001",
        "epoch_0001_update_000002", "epoch_0001_update_000004", "epoch_0002",
    ]  # fmt: skip
    shutil.copytree(whole / "checkpoints" / start, resumed / "checkpoints" / start)
    outcome = cli("--output", resumed, "--resume", "auto", *options, "--opts", *RANDOM, "DATA.NUM_WORKERS", 1)
    assert outcome.status == 0 and "resumed after epoch" in outcome.out
    for name in names[names.index(start) + 1 :]:
        same_state(whole / "checkpoints" / name, resumed / "checkpoints" / name)
    done = int(start[6:10]) * 5 + int(start[-1])
    losses = [[entry["loss"] for entry in read_log(run, "train")] for run in (whole, resumed)]
    assert len(losses[0]) == 10 and losses[0][done:] == losses[1]
    results = [json.loads((run / "metrics.json").read_text())["results"] for run in (whole, resumed)]
    if start < "epoch_0001":
        assert results[0] == results[1]
    else:
        # the first epoch's checkpoint is not in the new folder, so the best of it cannot be either
        assert results[0]["last"] == results[1]["last"]


def test_mesa_and_repeated_augmentation(cli, same_state, tmp_path):
    """The teacher is the average, which sets in inside the run; each image comes three times."""
    options = ["TRAIN.MESA", "1.5", "TRAIN.MESA_START", "0.5", "DATA.REPEATS", "3", *RANDOM]
    assert cli("--output", tmp_path / "a", "--opts", *options).status == 0
    start = "epoch_0001_update_000002"
    shutil.copytree(tmp_path / "a/checkpoints" / start, tmp_path / "b/checkpoints" / start)
    assert cli("--output", tmp_path / "b", "--resume", "auto", "--opts", *options).status == 0
    same_state(tmp_path / "a/checkpoints/epoch_0002", tmp_path / "b/checkpoints/epoch_0002")


def test_two_processes(torchrun, tiny_cfg, same_state, tmp_path):
    """Bit for bit for two processes as well; then 2 -> 1 -> 2 keeps the global batch, the order and the schedule."""
    common = ["--cfg", tiny_cfg, "--batch-size", 2, "--output"]
    done = torchrun(2, *common, tmp_path / "whole", "--opts", *RANDOM)
    assert done.returncode == 0, done.stderr[-3000:]
    start = "epoch_0000_update_000002"
    shutil.copytree(tmp_path / "whole/checkpoints" / start, tmp_path / "again/checkpoints" / start)
    done = torchrun(2, *common, tmp_path / "again", "--resume", "auto", "--opts", *RANDOM)
    assert done.returncode == 0, done.stderr[-3000:]
    same_state(tmp_path / "whole/checkpoints/epoch_0002", tmp_path / "again/checkpoints/epoch_0002")


@pytest.mark.full
def test_another_number_of_processes(cli, torchrun, tiny_cfg, read_log, tmp_path):
    """2 -> 1 -> 2: without augmentation the losses are those of the whole run, as order and updates are the same."""
    options = ["TRAIN.KEEP_CHECKPOINTS", "99", "TRAIN.SAVE_UPDATES", "2"]
    assert cli("--output", tmp_path / "whole", "--batch-size", 4, "--opts", *options).status == 0
    expected = read_log(tmp_path / "whole", "train")
    common = [
        "--cfg",
        tiny_cfg,
        "--batch-size",
        2,
        "--output",
        tmp_path / "run",
        "--resume",
        "auto",
        "--opts",
        *options,
    ]
    checkpoints = tmp_path / "run/checkpoints"

    def keep(last: str) -> None:
        for path in checkpoints.glob("epoch_*"):
            if path.name > last:
                shutil.rmtree(path)

    assert torchrun(2, *common).returncode == 0
    keep("epoch_0000_update_000002")
    outcome = cli(*common[2:])
    assert outcome.status == 0, outcome
    message = "1 process(es): batch 2 x 2 accumulation step(s) keep the run's 4 images per update"
    assert message in outcome.out
    # once more on one process: what was asked for is the same, so it is still the run's batch
    keep("epoch_0001")
    outcome = cli(*common[2:])
    assert outcome.status == 0 and message in outcome.out
    alone = read_log(tmp_path / "run", "train")
    keep("epoch_0001_update_000002")
    done = torchrun(2, *common)
    assert done.returncode == 0, done.stderr[-3000:]
    together = read_log(tmp_path / "run", "train")
    assert [entry["update"] for entry in together] == list(range(1, 11))
    for found in (alone, together):
        for one, other in zip(expected, found, strict=True):
            assert (one["update"], one["epoch"], one["lr"]) == (other["update"], other["epoch"], other["lr"])
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    content = json.loads((checkpoints / "epoch_0002/meta.json").read_text())
    assert (content["processes"], content["images_per_update"]) == (2, 4)
    # what cannot be shared is refused, and nothing is written
    before = sorted(checkpoints.iterdir())
    done = torchrun(3, *common)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    newest = (checkpoints / "epoch_0002").resolve()
    assert done.returncode != 0 and lines == [
        f"error: {newest} was written with 4 images per update, which 3 processes cannot share: use a number that "
        "divides it"
    ]
    assert sorted(checkpoints.iterdir()) == before and read_log(tmp_path / "run", "train") == together


def test_another_batch_size(cli, fails, tmp_path):
    """Between epochs the schedule goes on by epochs; inside one, only where the updates still fit."""
    options = ["--opts", "TRAIN.EPOCHS", 3, "TRAIN.KEEP_CHECKPOINTS", 99, "TRAIN.SAVE_UPDATES", 1]
    assert cli("--output", tmp_path / "a", *options).status == 0
    for start, batch in (("epoch_0001", 7), ("epoch_0000_update_000002", 8)):
        target = tmp_path / f"b{batch}"
        shutil.copytree(tmp_path / "a/checkpoints" / start, target / "checkpoints" / start)
        arguments = ("--output", target, "--resume", "auto", "--batch-size", batch)
        fails(*arguments, *options, parts=(f"images per update 4 -> {batch}", "--allow-changes"))
        outcome = cli(*arguments, "--allow-changes", *options)
        assert outcome.status == 0 and f"images per update were 4, now {batch}" in outcome.out
    shutil.copytree(
        tmp_path / "a/checkpoints/epoch_0000_update_000003", tmp_path / "c/checkpoints/epoch_0000_update_000003"
    )
    parts = ("3 updates of 4 images into an epoch", "no whole number of updates of 8", "former batch size")
    arguments = ("--output", tmp_path / "c", "--resume", "auto", "--batch-size", 8, "--allow-changes")
    fails(*arguments, *options, parts=parts)


@pytest.mark.full
def test_sharded_parameters(cli, torchrun, tiny_cfg, read_log, same_state, tmp_path):
    """FSDP2 makes the updates of one process; its checkpoints are whole, continue bit for bit, and serve anybody."""
    options = ["TRAIN.KEEP_CHECKPOINTS", "99", "TRAIN.SAVE_UPDATES", "2"]
    common = ["--cfg", tiny_cfg, "--batch-size", 2, "--resume", "auto", "--output"]
    sharded = ["--opts", *options, "PARALLEL", "fsdp"]
    done = torchrun(2, *common, tmp_path / "shares", *sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    assert cli("--output", tmp_path / "alone", "--batch-size", 4, "--opts", *options).status == 0
    curves = [read_log(tmp_path / name, "train") for name in ("shares", "alone")]
    for one, other in zip(*curves, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    start = "epoch_0001_update_000002"
    shutil.copytree(tmp_path / "shares/checkpoints" / start, tmp_path / "again/checkpoints" / start)
    done = torchrun(2, *common, tmp_path / "again", *sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    same_state(tmp_path / "shares/checkpoints/epoch_0002", tmp_path / "again/checkpoints/epoch_0002")
    # one process continues what shares wrote
    shutil.copytree(tmp_path / "shares/checkpoints" / start, tmp_path / "one/checkpoints" / start)
    resumed = cli("--output", tmp_path / "one", "--batch-size", 2, "--resume", "auto", "--opts", *options)
    assert resumed.status == 0
    for one, other in zip(read_log(tmp_path / "one", "train"), curves[0][7:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_teacher_with_statistics(torchrun, tiny_cfg, same_state, tmp_path, parallel):
    """MESA's teacher evaluates with running statistics, and is gathered anew after every update where it is sharded:
    two processes, begun in the middle of its phase, end with the same bits."""
    config = yaml.safe_load(tiny_cfg.read_text())
    config["MODEL"] |= {
        "NAME": "vssd_nano",
        "DROP_PATH_RATE": 0.0,
        "KWARGS": {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 4]},
    }
    config["TRAIN"] |= {"MESA": 1.0, "MESA_START": 0.0, "SAVE_UPDATES": 2, "KEEP_CHECKPOINTS": 99}
    config["PARALLEL"] = parallel
    file = tmp_path / "vssd.yaml"
    file.write_text(yaml.safe_dump(config))
    common = ["--cfg", file, "--batch-size", 2, "--resume", "auto", "--output"]
    done = torchrun(2, *common, tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    start = "epoch_0000_update_000002"
    shutil.copytree(tmp_path / "whole/checkpoints" / start, tmp_path / "again/checkpoints" / start)
    done = torchrun(2, *common, tmp_path / "again")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("epoch_0000_update_000004", "epoch_0002"):
        same_state(tmp_path / "whole/checkpoints" / name, tmp_path / "again/checkpoints" / name)
