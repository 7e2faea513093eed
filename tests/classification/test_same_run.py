"""A run goes on with the data and the options it began with, or says what is different."""

import json
import os
import re
import shutil

import pytest
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port

from ssm_train.cli import main
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.data.build import scan_split
from ssm_train.same_run import check_ranks, fingerprint

RESUME = ("--resume", "auto", "--opts", "TRAIN.EPOCHS", 2)


@pytest.fixture
def halfway(cli, tmp_path, own_tree):
    """A run that stopped after the first of two epochs, on data of its own."""
    assert cli("--data-path", own_tree, "--output", tmp_path / "run").status == 0
    shutil.rmtree(tmp_path / "run/checkpoints/epoch_0002")
    return tmp_path / "run"


def test_the_checkpoint_knows_its_data(halfway, own_tree, tiny_cfg):
    saved = json.loads((halfway / "checkpoints/epoch_0001/meta.json").read_text())["data"]
    assert saved["train"]["images"] == 21 and saved["val"]["images"] == 15 and saved["train"]["classes"] == 3
    # wherever the data lie, and however many processes read them
    moved = own_tree.rename(own_tree.with_name("elsewhere"))
    cfg = load_config(str(tiny_cfg), flags={"data_path": str(moved)})
    assert {split: fingerprint(scan_split(cfg, split), moved) for split in ("train", "val")} == saved


def rename_class(tree):
    for split in ("train", "val"):
        (tree / split / "dog").rename(tree / split / "zebra")


CHANGES = {
    "an image more": (
        lambda tree: shutil.copy(tree / "train/cat/0.png", tree / "train/cat/9.png"),
        ["training images 21 -> 22", "names, order or labels of the training images differ"],
    ),
    "another name": (
        lambda tree: (tree / "val/cat/0.png").rename(tree / "val/cat/00.png"),
        ["names, order or labels of the validation images differ"],
    ),
    "another label": (
        lambda tree: (tree / "train/cat/0.png").rename(tree / "train/dog/0_.png"),
        ["names, order or labels of the training images differ"],
    ),
    "another order of classes": (
        rename_class,
        ["names or order of the training classes differ", "names or order of the validation classes differ"],
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_data_are_noticed(halfway, fails, cli, own_tree, kind):
    change, differences = CHANGES[kind]
    change(own_tree)
    common = ("--data-path", own_tree, "--output", halfway)
    fails(*common, *RESUME, parts=(*differences, "epoch_0001 was written with other options or data"))
    outcome = cli(*common, "--allow-changes", *RESUME)
    assert outcome.status == 0, outcome
    for each in differences:
        assert f"changed since the checkpoint: {each}" in outcome.out


def test_other_options_are_noticed(halfway, fails, cli, own_tree):
    common = ("--data-path", own_tree, "--output", halfway, *RESUME)
    options = ("TRAIN.BASE_LR", 0.05, "AUG.HFLIP", 0.5, "SEED", 3)
    named = "AUG.HFLIP 0.0 -> 0.5; SEED 0 -> 3; TRAIN.BASE_LR 0.1 -> 0.05 (then -> now)"
    fails(*common, *options, parts=(named, "--allow-changes"))
    fails(*common, "DATA.BATCH_SIZE", 3, parts=("images per update 4 -> 3",))
    fails("--output", halfway, "--allow-changes", parts=("--allow-changes goes with --resume",))
    # those that change no result are nobody's business
    free = ("PRINT_FREQ", 3, "DATA.NUM_WORKERS", 1, "TRAIN.SAVE_UPDATES", 2, "TRAIN.KEEP_CHECKPOINTS", 9)
    outcome = cli(*common, *free, "DATA.MAX_BAD_SHARE", 0.3, "TRAIN.USE_CHECKPOINT", True)
    assert outcome.status == 0 and "changed since" not in outcome.out, outcome


def test_many_differences_are_counted(halfway, fails, own_tree):
    names = ("AUG.HFLIP", "AUG.REPROB", "AUG.MIXUP", "AUG.CUTMIX", "TRAIN.CLIP_GRAD", "TRAIN.BASE_LR", "TRAIN.EPS")
    options = [part for name in names for part in (name, 0.25)]
    line = fails("--data-path", own_tree, "--output", halfway, *RESUME, *options, parts=(" and 2 more (then -> now)",))
    assert len(re.findall(" -> 0.25", line)) == 5


def test_ranks_that_differ_are_named(tiny_cfg, monkeypatch):
    cfg = load_config(str(tiny_cfg))
    split = {"images": 21, "classes": 3, "class_names": "a", "image_names": "b"}
    data, world, said = {"train": split, "val": split}, World(rank=0, size=2, device=None), []
    monkeypatch.setattr(World, "gather", lambda self, value: said.append(value) or [value, value])
    check_ranks(world, cfg, data)
    other = {"options": {**said[0]["options"], "SEED": 7}, "data": {**data, "val": {**split, "images": 20}}}
    monkeypatch.setattr(World, "gather", lambda self, value: [value, other])
    with pytest.raises(UserError, match="process 1 differs from process 0: SEED 0 -> 7; validation images 21 -> 20"):
        check_ranks(world, cfg, data)


def _rank(rank: int, port: int, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    seed = ["--opts", "SEED", str(rank)]
    assert main([*arguments, *seed]) == 2


@pytest.mark.full
def test_real_ranks_that_differ_end_together(tiny_cfg, tmp_path, capfd):
    """Two processes with other seeds: both end with status 2, one line, and nothing is written."""
    arguments = ["--cfg", str(tiny_cfg), "--batch-size", "2", "--output", str(tmp_path / "run")]
    mp.spawn(_rank, (get_free_port(), arguments), nprocs=2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "process 1 differs from process 0: SEED 0 -> 1" in errors[0]
    assert not (tmp_path / "run").exists()
