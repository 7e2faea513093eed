"""Run folders that were damaged, edited, badly copied or made by somebody who means harm: one line, nothing lost."""

import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm_train.common.errors import UserError
from ssm_train.record.checkpoint import SUMS, Position, read_checkpoint
from ssm_train.record.store import CheckpointStore


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return {"root": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def run(cli, shared, tmp_path) -> Path:
    """A copy of a finished run of two epochs."""
    if "run" not in shared:
        shared["run"] = shared["root"] / "run"
        assert cli("--output", shared["run"], "--opts", "TRAIN.EPOCHS", 2).status == 0
    shutil.copytree(shared["run"], tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def sign(folder: Path) -> None:
    """Sums that are right for what the files of a checkpoint hold now."""
    names = [line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(sums))


def snapshot(folder: Path) -> dict[str, object]:
    """Everything in it but the lock."""
    paths = (path for path in folder.rglob("*") if path.name != ".lock")
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes() for p in paths
    }


ONE_EPOCH = ("--opts", "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)


# ---- nothing that could be somebody's run is begun anew or removed ----


def without_sums(run: Path) -> None:
    for path in run.glob(f"checkpoints/epoch_*/{SUMS}"):
        path.unlink()


def without_mount(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to("/nowhere/of/this/run")


def logs_alone(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def elsewhere(run: Path) -> None:
    shutil.rmtree(run)
    run.symlink_to("/nowhere/of/this/run")


def set_aside_only(run: Path) -> None:
    """What a kill inside a replacement leaves, damaged on top of it."""
    for path in list(run.glob("checkpoints/epoch_*")):
        (path / SUMS).unlink()
        path.rename(path.with_name(f".old-{path.name}"))


LOST = {
    "sums removed": (without_sums, "holds checkpoints, log.jsonl, log.txt, metrics.json"),
    "mount missing": (without_mount, "holds checkpoints, a link that leads nowhere, log.jsonl"),
    "logs alone": (logs_alone, "holds log.jsonl, log.txt, metrics.json"),
    "folder elsewhere": (elsewhere, "holds a link that leads nowhere"),
    "set aside": (set_aside_only, "holds checkpoints, log.jsonl"),
}


@pytest.mark.parametrize("kind", LOST)
def test_an_unverifiable_run_is_not_begun_anew(run, fails, kind):
    damage, words = LOST[kind]
    damage(run)
    before = snapshot(run)
    fails("--output", run, "--resume", "auto", parts=(words, "no valid checkpoint to continue from", "--fresh"))
    assert snapshot(run) == before


def test_fresh_sets_the_old_run_aside(run, cli, fails, tmp_path):
    without_sums(run)
    before = snapshot(run)
    outcome = cli("--output", run, "--fresh", *ONE_EPOCH)
    assert outcome.status == 0, outcome
    [kept] = [path for path in tmp_path.iterdir() if path.name.startswith("run-")]
    assert f"--fresh: the earlier run is kept in {kept}" in outcome.out
    assert snapshot(kept) == before
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 1
    fails("--output", run, "--fresh", "--resume", "auto", parts=("--fresh starts a run anew",))
    # nothing to set aside is no mistake
    assert cli("--output", tmp_path / "new", "--fresh", *ONE_EPOCH).status == 0


def test_fresh_after_a_restart_would_lose_what_was_trained(run, fails, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    fails("--output", run, "--fresh", parts=("--fresh would set aside", "--resume auto"))


def test_a_kill_before_the_first_checkpoint_leaves_nothing_that_counts(cli, tmp_path):
    (tmp_path / "run/checkpoints/.tmp-epoch_0000").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("")
    assert cli("--output", tmp_path / "run", "--resume", "auto", *ONE_EPOCH).status == 0


@pytest.mark.parametrize("only", ["everything", "last", "best"])
def test_copies_in_the_place_of_links(run, cli, tmp_path, only):
    """As `cp -rL`, `scp -r` and object stores make them."""
    shutil.copytree(run, tmp_path / "copy", symlinks=False)
    checkpoints = tmp_path / "copy/checkpoints"
    if only != "everything":
        for path in list(checkpoints.iterdir()):
            if path.name != only:
                shutil.rmtree(path)
    epoch = read_checkpoint(run / "checkpoints" / (only if only == "best" else "last")).position.epoch
    outcome = cli("--output", tmp_path / "copy", "--resume", "auto", "--opts", "TRAIN.EPOCHS", 2)
    assert outcome.status == 0 and f"resumed after epoch {epoch}" in outcome.out, outcome
    assert os.readlink(checkpoints / "last") == "epoch_0002"
    assert all(path.is_symlink() for path in checkpoints.iterdir() if not path.name.startswith("epoch_"))
    assert read_checkpoint(checkpoints / "last").position == Position(2)


def test_links_as_text_and_what_only_looks_like_a_checkpoint(run, cli, tmp_path):
    """Some stores keep a link as a file with its text; people put files and links beside checkpoints."""
    checkpoints = run / "checkpoints"
    (checkpoints / "last").unlink()
    (checkpoints / "last").write_text("epoch_0002")
    (checkpoints / "epoch_0003").write_text("my notes")
    (checkpoints / "epoch_0004").symlink_to(tmp_path)
    outcome = cli("--output", run, "--resume", "auto", "--allow-changes", "--opts", "TRAIN.EPOCHS", 4)
    assert outcome.status == 0 and "resumed after epoch 2" in outcome.out
    assert f"skipping {checkpoints / 'epoch_0003'}: a file" in outcome.out
    assert f"skipping {checkpoints / 'epoch_0004'}: a link" in outcome.out
    assert (checkpoints / "unverified_epoch_0003").read_text() == "my notes"
    assert os.readlink(checkpoints / "unverified_epoch_0004") == str(tmp_path)
    assert read_checkpoint(checkpoints / "epoch_0004").position == Position(4)


def test_newer_ones_that_do_not_verify_are_kept(run, cli):
    """The run goes on from an older one, and its own later checkpoints do not replace what might be mended."""
    newest = run / "checkpoints/epoch_0002"
    (newest / "model.safetensors").write_bytes(b"cut")
    outcome = cli("--output", run, "--resume", "auto", "--opts", "TRAIN.EPOCHS", 2)
    assert outcome.status == 0 and "resumed after epoch 1" in outcome.out
    assert (run / "checkpoints/unverified_epoch_0002/model.safetensors").read_bytes() == b"cut"
    assert read_checkpoint(newest).position == Position(2)


def test_checkpoints_that_came_since_the_folder_was_looked_at(run):
    """Another process has gone on meanwhile: they are whole, and stay where they are."""
    before = snapshot(run)
    with pytest.raises(UserError, match="goes on to epoch 2 since it was looked at: run this command again"):
        CheckpointStore(run / "checkpoints", 3).open(read_checkpoint(run / "checkpoints/epoch_0001"))
    assert snapshot(run) == before


# ---- meta.json ----


def changed(**values: object) -> Callable[[dict], object]:
    return lambda meta: {**meta, **values}


def without(*names: str) -> Callable[[dict], object]:
    return lambda meta: {name: value for name, value in meta.items() if name not in names}


FIELDS = ("epoch", "update", "results", "weights", "progress", "guard", "bad_images", "updates", "processes")
FIELDS += ("asked_batch", "images_per_update", "data", "config", "versions")
WRONG = {
    **{f"no {name}": without(name) for name in FIELDS},
    **{f"{name} of another kind": changed(**{name: [[1.5]]}) for name in FIELDS},
    **{f"{name} null": changed(**{name: None}) for name in FIELDS if name != "data"},
    "negative": changed(updates=-1),
    "a truth": changed(epoch=True),
    "huge": changed(updates=1 << 70),
    "another format": changed(format=99),
    "a format of another kind": changed(format="1"),
    "a list": lambda meta: [meta],
    "no processes": changed(processes=0),
    "no images": changed(images_per_update=0),
    "weights elsewhere": changed(weights="../../secret"),
    "no results": changed(results={}),
    "unknown results": changed(results={"worst": {"epoch": 1, "top1": 1.0, "top5": 1.0, "loss": 1.0, "images": 1}}),
    "results without numbers": changed(results={"best": {}, "last": {}}),
    "a reason that is none": changed(bad_images={"a.png": 3}),
    "an infinite time": lambda meta: {**meta, "progress": {**meta["progress"], "seconds": 1e400}},
    "a config of other keys": changed(config="NO: 1"),
    "a config that is none": changed(config="- a\n- b"),
    "a config with tags": changed(config="!!python/object/apply:os.system ['true']"),
    "a config that unfolds": changed(
        config="".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]\n" for n in range(12))
    ),
    "data of another kind": changed(data={"train": {}, "val": {}}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_edited_meta(run, fails, kind):
    folder = run / "checkpoints/epoch_0002"
    content = WRONG[kind](json.loads((folder / "meta.json").read_text()))
    (folder / "meta.json").write_text(json.dumps(content))
    sign(folder)
    shutil.rmtree(run / "checkpoints/epoch_0001")
    line = fails("--output", run, "--resume", folder, "--opts", "TRAIN.EPOCHS", 2, parts=())
    assert len(line) < 600 and "Traceback" not in line
    fails("--output", run, "--resume", "auto", "--opts", "TRAIN.EPOCHS", 2, parts=())


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b"nul", b'{"epoch": NaN}'])
def test_meta_that_is_no_json(run, fails, text):
    folder = run / "checkpoints/epoch_0002"
    (folder / "meta.json").write_bytes(text)
    sign(folder)
    fails("--eval", "--resume", folder, "--output", run / "e", parts=("epoch_0002 cannot be used: its meta.json is",))


def test_checkpoints_of_before_formats_are_read(run, cli):
    for folder in run.glob("checkpoints/epoch_*"):
        meta = without("format", "data")(json.loads((folder / "meta.json").read_text()))
        (folder / "meta.json").write_text(json.dumps(meta))
        sign(folder)
    shutil.rmtree(run / "checkpoints/epoch_0002")
    assert cli("--output", run, "--resume", "auto", "--opts", "TRAIN.EPOCHS", 2).status == 0
    assert json.loads((run / "checkpoints/last/meta.json").read_text())["format"] == 1


# ---- train_state.pt and weights ----

NAME = "classifier.head.weight"


def of_optimizer(change: Callable[[dict], object]) -> Callable[[dict], None]:
    """In place, or with what `change` returns."""

    def act(state: dict) -> None:
        changed = change(state["optimizer"])
        state["optimizer"] = state["optimizer"] if changed is None else changed

    return act


STATES = {
    "another shape": (of_optimizer(lambda o: o[NAME].update(exp_avg=torch.zeros(1))), "exp_avg of classifier.head"),
    "another dtype": (of_optimizer(lambda o: o[NAME].update(exp_avg=o[NAME]["exp_avg"].double())), "float64 of shape"),
    "integer steps": (of_optimizer(lambda o: o[NAME].update(step=torch.tensor(3))), "step of classifier.head.weight"),
    "no steps": (of_optimizer(lambda o: o[NAME].pop("step") and None), "the state of classifier.head.weight is"),
    "one more": (of_optimizer(lambda o: o[NAME].update(more=torch.zeros(1))), "exp_avg, exp_avg_sq, more, step"),
    "a parameter less": (of_optimizer(lambda o: {k: v for k, v in o.items() if k != NAME}), "no state for classifier"),
    "a parameter more": (of_optimizer(lambda o: {**o, "x": o[NAME]}), "a state for x, which is not trained"),
    "nan": (of_optimizer(lambda o: o[NAME]["exp_avg_sq"].fill_(math.nan).sum() and None), "exp_avg_sq of classifier"),
    "emptied": (of_optimizer(lambda o: {}), "no state for"),
    "numbers": (of_optimizer(lambda o: {NAME: {"step": 1}}), "no state of a training"),
    "no optimizer": (lambda state: state.pop("optimizer"), "no state of a training"),
    "no updates": (lambda state: state.pop("updates"), "no state of a training"),
    "negative updates": (lambda state: state.update(updates=-5), "no state of a training"),
    "a scaler that is none": (lambda state: state.update(scaler={"scale": "big"}), "its scaler has scale"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_edited_train_state(run, fails, kind):
    change, words = STATES[kind]
    folder = run / "checkpoints/epoch_0002"
    state = torch.load(folder / "train_state.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "train_state.pt")
    sign(folder)
    fails("--output", run, "--resume", "auto", "--opts", "TRAIN.EPOCHS", 2, parts=(f"{folder}/train_state.pt", words))


WEIGHTS = {
    "nan": (lambda w: w[NAME].fill_(math.nan), f"{NAME} has "),
    "infinite": (lambda w: w[NAME].view(-1)[0].fill_(math.inf), f"{NAME} has "),
    "half": (lambda w: w.update({NAME: w[NAME].half()}), f"{NAME} is torch.float16, not torch.float32"),
    "integers": (lambda w: w.update({NAME: w[NAME].int()}), f"{NAME} is torch.int32, not torch.float32"),
    "another shape": (lambda w: w.update({NAME: w[NAME][:2].clone()}), f"other shapes: {NAME} (2, "),
    "less": (lambda w: w.pop(NAME), f"missing {NAME}"),
}


@pytest.mark.parametrize("file", ["model.safetensors", "model_ema.safetensors"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_edited_weights(run, fails, kind, file):
    change, words = WEIGHTS[kind]
    folder = run / "checkpoints/epoch_0002"
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file)
    sign(folder)
    fails("--output", run, "--resume", "auto", "--opts", "TRAIN.EPOCHS", 2, parts=(str(folder / file), words))
    fails("--eval", "--resume", folder, "--output", run / "e", parts=(str(folder / file), words))


# ---- what is no file ----


def a_socket(path: Path) -> None:
    # sockets' names are short
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "loop": lambda path: path.symlink_to(path.name),
    "socket": a_socket,
}


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "meta.json", SUMS])
@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_read(run, fails, kind, name):
    """A pipe would wait for ever, /dev/zero never end, and a link give away somebody's file."""
    folder = run / "checkpoints/epoch_0002"
    (folder / name).unlink()
    SPECIAL[kind](folder / name)
    fails("--eval", "--resume", folder, "--output", run / "e", parts=(f"{folder} is no complete checkpoint ({name}: ",))


def test_only_what_the_sums_list_is_read_or_copied(run, cli, tmp_path):
    folder = run / "checkpoints/epoch_0002"
    (folder / "extra.bin").write_bytes(b"x" * 100)
    os.mkfifo(folder / "pipe")
    (folder / "model_ema.safetensors").unlink()
    lines = [line for line in (folder / SUMS).read_text().splitlines(keepends=True) if "model_ema" not in line]
    (folder / SUMS).write_text("".join(lines))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "weights": "model"}))
    sign(folder)
    save_file(load_file(folder / "model.safetensors"), folder / "model_ema.safetensors")
    outcome = cli("--output", tmp_path / "branch", "--resume", folder, "--opts", "TRAIN.EPOCHS", 2)
    assert outcome.status == 0 and "has no averaged weights" in outcome.out, outcome
    copied = {path.name for path in (tmp_path / "branch/checkpoints/epoch_0002").iterdir()}
    assert copied == {"model.safetensors", "train_state.pt", "meta.json", SUMS}


@pytest.mark.parametrize(
    "text", ["\n", "x", "a  b  c\n", "0  ../model.safetensors\n", "0  /etc/passwd\n", "0" * 100_000, ""]
)
def test_sums_that_are_none(run, fails, text):
    folder = run / "checkpoints/epoch_0002"
    (folder / SUMS).write_text(text)
    fails("--eval", "--resume", folder, "--output", run / "e", parts=(f"{folder} is damaged ({SUMS}",))


def test_metrics_that_are_no_json(run, fails):
    (run / "metrics.json").write_text("{")
    fails("--eval", "--resume", "auto", "--output", run, parts=("metrics.json is no JSON",))


def test_store_entries_of_any_kind(run):
    """None of them is followed, and none stops the run."""
    checkpoints = run / "checkpoints"
    os.mkfifo(checkpoints / "epoch_0009")
    (checkpoints / "epoch_0008").symlink_to("epoch_0008")
    (checkpoints / ("epoch_" + "9" * 200)).mkdir()
    assert CheckpointStore(checkpoints, 3).newest_valid().position == Position(2)
