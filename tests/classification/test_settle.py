"""What the config leaves open: classes by the data, workers and batch by the machine, and the same after a resume."""

import json
import shutil

import pytest
import torch
import yaml

from ssm_train import settle
from ssm_train.common import machine
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.data.build import scan_split
from ssm_train.settle import recipe_batch, with_epochs, with_machine
from ssm_train.step.memory import kept_bytes
from tests.classification.formats import WRITERS

CPU = World(0, 1, torch.device("cpu"))
GB = 2**30


@pytest.fixture
def open_cfg(tiny_cfg, tmp_path):
    """tiny.yaml without classes, batch and workers."""
    content = yaml.safe_load(tiny_cfg.read_text())
    del content["MODEL"]["NUM_CLASSES"], content["DATA"]["BATCH_SIZE"], content["DATA"]["NUM_WORKERS"]
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def here(monkeypatch):
    """here(cores, memory): a machine with these, and what an image keeps counted as 1 GB."""

    def pretend(cores: int, memory: int) -> None:
        monkeypatch.setattr(settle, "usable_cores", lambda: cores)
        monkeypatch.setattr(settle, "memory_bytes", lambda device: memory)
        monkeypatch.setattr(settle, "kept_bytes", lambda cfg, amp: GB)

    return pretend


def read_config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def batch_of(config) -> tuple[int, int]:
    return config["DATA"]["BATCH_SIZE"], config["TRAIN"]["ACCUMULATION_STEPS"]


def test_a_run_settles_all_and_its_resume_keeps_it(open_cfg, cli, fails, here, tmp_path, same_state):
    """Stopped after an epoch and continued on a larger machine, it ends with the same bits."""
    here(2, 9 * GB)
    outcome = cli("--output", tmp_path / "a", cfg=open_cfg)
    assert outcome.status == 0, outcome
    assert "MODEL.NUM_CLASSES is not given: 3, as many as the data have" in outcome.out
    assert "DATA.NUM_WORKERS is not given: 2, for 2 core(s) and 1 process(es) here" in outcome.out
    # of 21 images 8 are an update, of which 4 GB can be held at once
    assert "DATA.BATCH_SIZE is not given: 4 images x 2 micro-step(s) per process and update" in outcome.out
    config = read_config(tmp_path / "a")
    assert (config["MODEL"]["NUM_CLASSES"], config["DATA"]["NUM_WORKERS"]) == (3, 2) and batch_of(config) == (4, 2)
    assert json.loads((tmp_path / "a/metrics.json").read_text())["mode"] == "train"

    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    shutil.rmtree(tmp_path / "b/checkpoints/epoch_0002")
    here(1, 1000 * GB)
    outcome = cli("--output", tmp_path / "b", "--resume", "auto", cfg=open_cfg)
    assert outcome.status == 0 and "resumed after epoch 1" in outcome.out and "BATCH_SIZE is not" not in outcome.out
    config = read_config(tmp_path / "b")
    assert (config["MODEL"]["NUM_CLASSES"], config["DATA"]["NUM_WORKERS"]) == (3, 1) and batch_of(config) == (4, 2)
    same_state(*(tmp_path / name / "checkpoints/epoch_0002" for name in "ab"))

    # with the recipe's steps in one, it is the same update
    outcome = cli("--output", tmp_path / "c", cfg=open_cfg)
    assert outcome.status == 0 and batch_of(read_config(tmp_path / "c")) == (8, 1)
    # who gives a batch gets it, after a resume, too
    shutil.copytree(tmp_path / "a", tmp_path / "d", symlinks=True)
    shutil.rmtree(tmp_path / "d/checkpoints/epoch_0002")
    resumed = ("--output", tmp_path / "d", "--resume", "auto", "--batch-size", 2)
    fails(*resumed, parts=("images per update 8 -> 2", "--allow-changes"), cfg=open_cfg)
    outcome = cli(*resumed, "--allow-changes", cfg=open_cfg)
    assert outcome.status == 0 and batch_of(read_config(tmp_path / "d")) == (2, 1)


def test_evaluation_and_measurements(open_cfg, cli, fails, here, tmp_path, own_tree):
    here(2, 9 * GB)
    assert (
        cli("--output", tmp_path / "a", "--opts", "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, cfg=open_cfg).status == 0
    )
    last = tmp_path / "a/checkpoints/last"
    outcome = cli("--output", tmp_path / "e", "--eval", "--resume", last, cfg=open_cfg)
    assert outcome.status == 0 and "NUM_CLASSES is not" not in outcome.out
    assert json.loads((tmp_path / "e/metrics.json").read_text())["images"] == 15
    # the checkpoint's classes, not those of other data
    shutil.rmtree(own_tree / "val/eel")
    data = ("--data-path", own_tree, "--output", tmp_path / "f")
    fails(*data, "--eval", "--resume", last, parts=("holds 2 class folders", "NUM_CLASSES is 3"), cfg=open_cfg)
    fails(*data, parts=("val holds 2 class folders", "NUM_CLASSES is 3"), cfg=open_cfg)
    # nothing but a network: its own classes
    outcome = cli("--traincost", cfg=open_cfg)
    assert outcome.status == 0 and "batch 4," in outcome.out and "NUM_CLASSES" not in outcome.out
    fails("--throughput", "--opts", "MODEL.NAME", "vmamba_nono", parts=("'vmamba_nono'", "vmamba_nano"), cfg=open_cfg)


@pytest.mark.parametrize("kind", ["folder", *WRITERS])
def test_every_format_knows_its_classes(kind, image_tree, tiny_cfg, tmp_path):
    root = image_tree if kind == "folder" else tmp_path
    if kind != "folder":
        WRITERS[kind](image_tree, tmp_path)
    opts = ["MODEL.NUM_CLASSES", "None", "DATA.DATASET", kind.split()[0], "DATA.DATA_PATH", str(root)]
    given = load_config(str(tiny_cfg), opts[2:])
    for split in ("train", "val"):
        found, expected = scan_split(load_config(str(tiny_cfg), opts), split), scan_split(given, split)
        assert found.classes == expected.classes and len(found.classes) == 3
        assert found.targets.tolist() == expected.targets.tolist()


def test_labels_that_are_no_classes(image_tree, tiny_cfg, tmp_path):
    opts = ["MODEL.NUM_CLASSES", "None", "DATA.DATASET", "imagenet22k", "DATA.DATA_PATH", str(tmp_path)]
    for label, reason in (
        (10**9, "has the label 1000000000, but labels are integers from 0 to 999999"),
        (-1, "label -1"),
    ):
        (tmp_path / "train.json").write_text(json.dumps([["a.png", label]]))
        with pytest.raises(UserError, match=reason):
            scan_split(load_config(str(tiny_cfg), opts), "train")
    WRITERS["zip"](image_tree, tmp_path)
    lines = (tmp_path / "train_map.txt").read_text().replace("\t2", "\t3")
    (tmp_path / "train_map.txt").write_text(lines)
    opts[3] = "zip"
    with pytest.raises(UserError, match="holds no image of class '2': add some, number the classes without gaps"):
        scan_split(load_config(str(tiny_cfg), opts), "train")


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 2), (64, 1, 8), (64, 8, 8), (64, 32, 2), (4, 8, 0)]
)
def test_workers(open_cfg, monkeypatch, cores, processes, workers):
    monkeypatch.setattr(settle, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    cfg = load_config(str(open_cfg), ["DATA.BATCH_SIZE", "4"])
    assert workers == with_machine(cfg, CPU).DATA.NUM_WORKERS
    # what is given stays
    given = load_config(str(open_cfg), ["DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "5"])
    assert with_machine(given, CPU).DATA.NUM_WORKERS == 5


@pytest.mark.parametrize(
    ("device", "memory", "steps", "batch"),
    [
        *[("cuda", 256, 1, (128, 1)), ("cuda", 255, 1, (64, 2)), ("cuda", 20, 2, (8, 32)), ("cuda", 1, 1, (2, 64))],
        *[("cpu", 256, 1, (16, 8)), ("cpu", 20, 1, (8, 16)), ("cpu", 20, 2, (8, 32))],
    ],
)
def test_batch(open_cfg, here, monkeypatch, device, memory, steps, batch):
    """The micro-steps of an update always are 128 images together, times what the user accumulates; a CPU does not take
    more than 16 at once."""
    here(2, memory * GB)
    monkeypatch.setattr(settle, "resolve_amp", lambda amp, device: "off")
    world = World(0, 1, torch.device(device))
    cfg = with_machine(load_config(str(open_cfg), [], {"accumulation_steps": steps}), world)
    assert batch == (cfg.DATA.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS)


def test_batch_of_few_images():
    """An epoch has eight updates at least, but none of less than eight images, unless there are no more."""
    counts = (1281167, 1024, 1023, 128, 127, 21, 7, 3, 1)
    assert [recipe_batch(1, count) for count in counts] == [128, 128, 64, 16, 8, 8, 4, 2, 2]
    assert recipe_batch(8, 8 * 1024) == 128 and recipe_batch(8, 1000) == 8 and recipe_batch(8, None) == 128


def test_epochs_by_updates(open_cfg):
    def settled(updates_per_epoch: int, *opts: object) -> tuple[int, int]:
        open_epochs = ("TRAIN.EPOCHS", "None", "TRAIN.WARMUP_EPOCHS", "None")
        cfg = with_epochs(load_config(str(open_cfg), [*open_epochs, *map(str, opts)]), updates_per_epoch)
        return cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS

    # 300 updates, 5 epochs at least and 100 at most
    assert [settled(updates) for updates in (1, 2, 8, 12, 60, 5000)] == [
        *[(100, 10), (100, 10), (38, 4), (25, 3), (5, 1), (5, 1)]
    ]
    assert settled(12, "TRAIN.UPDATES", 1000) == (83, 9)
    # what is given stays
    assert settled(12, "TRAIN.EPOCHS", 1) == (1, 0) and settled(12, "TRAIN.EPOCHS", 11) == (11, 2)
    assert settled(12, "TRAIN.EPOCHS", 9, "TRAIN.WARMUP_EPOCHS", 4) == (9, 4)
    with pytest.raises(UserError, match="TRAIN.WARMUP_EPOCHS is 3, but it must be None where TRAIN.EPOCHS is"):
        settled(12, "TRAIN.WARMUP_EPOCHS", 3)


def test_memory_is_that_of_the_machine_or_container(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    whole = machine.memory_bytes(cpu)
    assert GB < whole < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.memory_bytes(cpu) == whole // 4
    (tmp_path / "memory.max").write_text(f"{GB}\n")
    monkeypatch.setattr(machine, "_MEMORY_LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
    assert machine.memory_bytes(cpu) == GB // 4
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_bytes(cpu) > GB // 4


def test_kept_bytes_of_a_network_that_can_be_counted(open_cfg):
    """Three layers by hand; twice for two passes, less where nothing is learnt, as much with recomputation."""
    opts = ["MODEL.NAME", "test_resnet", "DATA.IMG_SIZE", "64"]

    def kept(*more: str) -> int:
        path = open_cfg.with_name("resnet.yaml")
        content = yaml.safe_load(open_cfg.read_text())
        content["MODEL"] = {"NAME": "test_resnet"}
        path.write_text(yaml.safe_dump(content))
        return kept_bytes(load_config(str(path), [*opts, *more]), "off")

    once = kept()
    # at least the image and the map behind the first layer, in fp32
    assert 4 * 3 * 64 * 64 < once < 50 * 2**20
    assert kept("DATA.IMG_SIZE", "128") == pytest.approx(4 * once, rel=0.1)
    assert kept("TRAIN.LOSS", "bce", "TRAIN.COSUB", "True", "MODEL.LABEL_SMOOTHING", "0") == 2 * once
    assert kept("TRAIN.LINEAR_PROBE", "True") < 0.05 * once
    before = torch.random.get_rng_state()
    cfg = load_config(str(open_cfg))
    assert kept_bytes(cfg, "off") == pytest.approx(kept_bytes(cfg, "off"))
    assert not torch.equal(before, torch.random.get_rng_state())
