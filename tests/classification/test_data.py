"""Order and augmentation as functions of (seed, epoch, index), image folders, and the digits."""

import math
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.seeding import epoch_order
from ssm_train.config.load import load_config
from ssm_train.data import digits
from ssm_train.data.build import close_workers, eval_loader, scan_split, train_loader
from ssm_train.data.dataset import BadImage, BadImages, TrainImages, allowed_bad
from ssm_train.data.digits import main as digits_main
from ssm_train.data.digits import split_digits
from ssm_train.data.samplers import EvalBatches, Key, TrainBatches
from ssm_train.data.transforms import eval_transform, train_transform

CPU = World(0, 1, torch.device("cpu"))
AUGMENTED = "AUG.HFLIP 0.5 AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1 AUG.REPROB 0.5 TRAIN.EPOCHS 3"


def batches_of(loader, epoch: int = 0, update: int = 0) -> list:
    loader.batch_sampler.set_position(epoch, update)
    return list(loader)


def interleaved(parts: list[list]) -> list:
    """The whole of which rank r has every len(parts)-th element, from the r-th on."""
    return [element for row in zip(*parts, strict=True) for element in row]


def test_worlds_see_the_same_global_batches():
    """In the same order: rank r takes every W-th image of each."""
    count, batch = 103, 12
    alone = TrainBatches(count, batch, seed=5)
    for epoch in (0, 1):
        alone.set_position(epoch)
        expected = list(alone)
        assert len(expected) == len(alone) == 103 // 12
        seen = [key for keys in expected for key in keys]
        assert [key.index for key in seen] == epoch_order(5, epoch, count)[: 8 * 12]
        assert {(key.epoch, key.repeat) for key in seen} == {(epoch, 0)}
        for size in (2, 3):
            ranks = [TrainBatches(count, batch // size, rank=r, world_size=size, seed=5) for r in range(size)]
            for sampler in ranks:
                sampler.set_position(epoch)
            assert [interleaved(list(parts)) for parts in zip(*ranks, strict=True)] == expected
    first = list(alone)
    alone.set_position(0)
    assert {key.index for key in first[0]} != {key.index for key in next(iter(alone))}


def test_accumulation_keeps_whole_updates():
    sampler = TrainBatches(103, 4, world_size=2, accumulation=3, seed=0)
    assert (sampler.updates_per_epoch, len(sampler)) == (4, 12)
    big = TrainBatches(103, 24, seed=0)
    parts = [list(TrainBatches(103, 4, rank=r, world_size=2, accumulation=3, seed=0)) for r in (0, 1)]
    for number, keys in enumerate(big):
        steps = [interleaved([rank[step] for rank in parts]) for step in range(3 * number, 3 * number + 3)]
        assert steps[0] + steps[1] + steps[2] == keys and len(keys) == 24
    with pytest.raises(UserError, match="103 images, but one optimizer update takes 104"):
        TrainBatches(103, 52, world_size=2)


def test_repeats():
    """The copies of an image follow each other, on as many ranks; an epoch has as many keys as without."""
    alone = TrainBatches(60, 12, seed=5, repeats=3)
    alone.set_position(2)
    keys = [key for batch in alone for key in batch]
    order = epoch_order(5, 2, 60)[:20]
    assert keys == [Key(2, index, repeat) for index in order for repeat in range(3)]
    ranks = [TrainBatches(60, 4, rank=r, world_size=3, seed=5, repeats=3) for r in range(3)]
    for number, sampler in enumerate(ranks):
        sampler.set_position(2)
        assert [key for batch in sampler for key in batch] == [Key(2, index, number) for index in order]


def test_start_in_the_middle_of_an_epoch():
    """What is left is the end of the whole epoch, also with another number of ranks."""
    whole = TrainBatches(103, 12, seed=5, repeats=2)
    whole.set_position(1)
    expected = list(whole)
    whole.set_position(1, 5)
    assert list(whole) == expected[5:] and len(whole) == 3
    ranks = [TrainBatches(103, 2, rank=r, world_size=2, accumulation=3, seed=5, repeats=2) for r in range(2)]
    for sampler in ranks:
        sampler.set_position(1, 5)
        assert len(sampler) == 9
    micro = [interleaved(list(parts)) for parts in zip(*ranks, strict=True)]
    assert [micro[i] + micro[i + 1] + micro[i + 2] for i in (0, 3, 6)] == expected[5:]
    whole.set_position(1, 8)
    assert list(whole) == [] and len(whole) == 0
    whole.set_position(2)
    assert len(list(whole)) == 8


def test_evaluation_sees_each_image_once():
    for count, size in ((15, 1), (15, 2), (16, 3), (2, 3)):
        keys = [key for r in range(size) for step in EvalBatches(count, 4, rank=r, world_size=size) for key in step]
        assert sorted(keys) == [Key(0, index) for index in range(count)]
        assert len(EvalBatches(count, 4, rank=0, world_size=size)) == math.ceil(math.ceil(count / size) / 4)


def test_augmentation_depends_on_the_key_alone(tiny_cfg):
    """Not on the number of workers, on what was drawn before, or on the neighbours in the batch."""
    cfg = load_config(str(tiny_cfg), AUGMENTED.split())
    found = scan_split(cfg, "train")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    plain = batches_of(train_loader(cfg, found, CPU), epoch=1)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    with_workers = load_config(str(tiny_cfg), [*AUGMENTED.split(), "DATA.NUM_WORKERS", "2"])
    for one, other in zip(plain, batches_of(train_loader(with_workers, found, CPU), epoch=1), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)
    halves = [
        train_loader(
            load_config(str(tiny_cfg), [*AUGMENTED.split(), "DATA.BATCH_SIZE", "2"]), found, World(r, 2, CPU.device)
        )
        for r in (0, 1)
    ]
    joined = [interleaved(list(parts)) for parts in zip(*(of_images(half, epoch=1) for half in halves), strict=True)]
    for one, other in zip(plain, joined, strict=True):
        assert torch.equal(one.images, torch.stack(other))
    # nor on what the epoch began with
    for one, other in zip(
        plain[2:], batches_of(train_loader(with_workers, found, CPU), epoch=1, update=2), strict=True
    ):
        assert torch.equal(one.images, other.images) and one.keys == other.keys
    other_epoch = batches_of(train_loader(cfg, found, CPU), epoch=2)
    assert not any(torch.equal(a.images, b.images) for a, b in zip(plain, other_epoch, strict=True))
    dataset, reseeded = (TrainImages(found, train_transform(cfg), seed=seed, max_bad_share=0) for seed in (0, 1))
    same = dataset[Key(1, 3)].image
    assert torch.equal(same, dataset[Key(1, 3)].image) and not torch.equal(same, reseeded[Key(1, 3)].image)
    # the copies of repeated augmentation differ
    assert not torch.equal(same, dataset[Key(1, 3, 1)].image)


def of_images(loader, epoch: int) -> list[list[torch.Tensor]]:
    return [list(batch.images) for batch in batches_of(loader, epoch)]


def test_loader_settings(tiny_cfg):
    """Four batches wait per worker; keys name the images in order; DATA.REPEATS arrives."""
    cfg = load_config(str(tiny_cfg), ["DATA.NUM_WORKERS", "2", "DATA.REPEATS", "2"])
    loader = train_loader(cfg, scan_split(cfg, "train"), CPU)
    assert (loader.prefetch_factor, loader.persistent_workers) == (4, True)
    order = epoch_order(cfg.SEED, 0, 21)
    batches = batches_of(loader)
    assert batches[0].keys == [Key(0, order[0], 0), Key(0, order[0], 1), Key(0, order[1], 0), Key(0, order[1], 1)]
    assert [batch.targets.tolist() for batch in batches] == [[key.index // 7 for key in b.keys] for b in batches]
    plain = load_config(str(tiny_cfg))
    assert train_loader(plain, scan_split(plain, "train"), CPU).prefetch_factor is None


def test_transforms(tiny_cfg):
    def names(transform):
        return [type(step).__name__ for step in transform.transforms]

    small = load_config(str(tiny_cfg))
    assert names(train_transform(small)) == ["Resize", "RandomCrop", "MaybeToTensor", "Normalize"]
    crop = train_transform(small).transforms[1]
    assert (crop.size, crop.padding) == ((32, 32), 4)
    assert names(eval_transform(small)) == ["Resize", "ToTensor", "Normalize"]
    published = "DATA.IMG_SIZE 224 AUG.HFLIP 0.5 AUG.COLOR_JITTER 0.4 AUG.REPROB 0.25"
    large = load_config(str(tiny_cfg), published.split())
    assert names(train_transform(large)) == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "ColorJitter", "MaybeToTensor", "Normalize",
        "RandomErasing",
    ]  # fmt: skip
    resize, crop = eval_transform(large).transforms[:2]
    assert (resize.size, crop.size) == (256, (224, 224))
    assert eval_transform(large)(Image.new("RGB", (300, 500))).shape == (3, 224, 224)
    assert train_transform(small)(Image.new("RGB", (8, 8))).shape == (3, 32, 32)
    with pytest.raises(UserError, match="'nonsense' is not a policy"):
        train_transform(load_config(str(tiny_cfg), ["AUG.AUTO_AUGMENT", "nonsense"]))


def damage(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:60])
    return str(path)


def test_unreadable_training_image_is_replaced_by_the_next(tiny_cfg, own_tree):
    cfg = load_config(str(tiny_cfg), ["DATA.DATA_PATH", str(own_tree)])
    found = scan_split(cfg, "train")
    dataset = TrainImages(found, eval_transform(cfg), seed=0, max_bad_share=3 / 21)
    bad = [damage(own_tree / "train/cat/5.png"), damage(own_tree / "train/cat/6.png")]
    sample = dataset[Key(0, 5)]
    assert [entry.path for entry in sample.bad] == bad and all(entry.reason for entry in sample.bad)
    assert found.name(7).endswith("dog/0.png") and sample.target == 1 and sample.key == Key(0, 5)
    assert torch.equal(sample.image, dataset[Key(0, 7)].image)
    # the last image wraps around to the first
    damage(own_tree / "train/eel/6.png")
    assert dataset[Key(0, 20)].target == 0
    missing = own_tree / "train/dog/1.png"
    missing.unlink()
    assert [entry.path for entry in dataset[Key(0, 8)].bad] == [str(missing)]
    # after as many failures as are allowed, and one, the search ends
    for number in range(7):
        damage(own_tree / f"train/cat/{number}.png")
    sample = dataset[Key(0, 0)]
    assert len(sample.bad) == 4 and sample.image.flatten(1).std(1).max() < 1e-6
    strict = TrainImages(found, eval_transform(cfg), seed=0, max_bad_share=0)
    assert len(strict[Key(0, 0)].bad) == 1
    # the only readable image is found when all others may be bad
    for path in sorted((own_tree / "train").rglob("*.png"))[:-2]:
        damage(path)
    patient = TrainImages(found, eval_transform(cfg), seed=0, max_bad_share=1)
    assert len(patient[Key(0, 0)].bad) == 19 and patient[Key(0, 0)].target == 2


def test_too_many_bad_images_stop_all_ranks(caplog):
    bad = BadImages(CPU, 10, 0.25)
    for _ in range(2):
        bad.add([BadImage("b.png", "cut"), BadImage("a.png", "gone")])
        bad.share()
    assert bad.count == 2 and bad.entries() == [BadImage("a.png", "gone"), BadImage("b.png", "cut")]
    assert [record.getMessage() for record in caplog.records] == [
        "unreadable image, replaced by the next readable one: a.png (gone)",
        "unreadable image, replaced by the next readable one: b.png (cut)",
    ]
    # a continued run remembers them
    again = BadImages(CPU, 10, 0.25)
    again.load(bad.state())
    again.add([BadImage("a.png", "gone")])
    again.share()
    assert again.entries() == bad.entries() and len(caplog.records) == 2
    again.add([BadImage("c.png", "cut")])
    with pytest.raises(
        UserError,
        match=r"3 of 10 training images are unreadable \(30\.00%\), but DATA\.MAX_BAD_SHARE 0\.25 allows 2 of 10: "
        r"a\.png, b\.png, c\.png",
    ):
        again.share()
    nothing_left = BadImages(CPU, 1, 1.0)
    nothing_left.add([BadImage("a.png", "cut")])
    with pytest.raises(UserError, match="1 of 1 training images .* allows 0 of 1"):
        nothing_left.share()
    validation = BadImages(CPU, 1, None)
    validation.add([BadImage("a.png", "cut")])
    validation.share()
    assert validation.count == 1


def test_bad_images_are_one_list_on_all_ranks():
    """What two ranks report is exchanged; both raise at the same time."""

    class Pair(World):
        """Rank 0, where rank 1 always reports `other`."""

        def sum(self, values):
            found, *rest = values
            return [found + 1, *rest]

        def gather(self, value):
            return [value, {"z.png": "cut"}]

    bad = BadImages(Pair(0, 2, CPU.device), 10, 0.1)
    bad.share()
    assert bad.state() == {"z.png": "cut"}
    bad.add([BadImage("a.png", "gone")])
    with pytest.raises(UserError, match="2 of 10 .* allows 1 of 10: a.png, z.png"):
        bad.share()


def test_allowed_share():
    assert [allowed_bad(share, 100) for share in (0, 0.004, 0.01, 0.29, 0.5, 1)] == [0, 0, 1, 29, 50, 99]
    assert (allowed_bad(0.05, 21), allowed_bad(0.1, 21), allowed_bad(1, 1)) == (1, 2, 0)


def test_bad_validation_image_leaves_the_batch(tiny_cfg, own_tree):
    cfg = load_config(str(tiny_cfg), ["DATA.DATA_PATH", str(own_tree)])
    found = scan_split(cfg, "val")
    path = damage(own_tree / "val/cat/1.png")
    batches = list(eval_loader(cfg, found, CPU))
    assert [len(batch.targets) for batch in batches] == [3, 4, 4, 3]
    assert [entry.path for entry in batches[0].bad] == [path]
    assert batches[0].keys == [Key(0, 0), Key(0, 2), Key(0, 3)] and batches[3].keys[-1] == Key(0, 14)
    for number in range(5):
        for name in ("cat", "dog", "eel"):
            damage(own_tree / f"val/{name}/{number}.png")
    assert all(len(batch.targets) == 0 and batch.keys == [] for batch in eval_loader(cfg, found, CPU))


def test_digits_are_written_once(tmp_path, capsys):
    out = tmp_path / "digits"
    assert digits_main(["--out", str(out)]) == 0
    assert "written" in capsys.readouterr().out
    counts = {split: [len(list((out / split / str(c)).glob("*.png"))) for c in range(10)] for split in ("train", "val")}
    assert counts["val"] == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert [a + b for a, b in zip(counts["train"], counts["val"], strict=True)] == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    image = Image.open(out / "train/0/digit_0000.png")
    assert (image.mode, image.size) == ("L", (32, 32)) and np.asarray(image).max() > 200
    # the second call looks and touches nothing
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert digits_main(["--out", str(out)]) == 0
    assert "is complete" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    # a damaged tree is named, not repaired behind the user's back
    (out / "val/3/digit_0003.png").unlink(missing_ok=True)
    victim = next((out / "val/3").glob("*.png"))
    victim.write_bytes(b"x")
    assert digits_main(["--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(victim) in error and error.count("\n") == 1 and error.startswith("error: ")


def test_digits_made_by_two_at_a_time_and_after_a_kill(tmp_path, capsys, monkeypatch):
    """What a killed maker left goes, what another one is filling stays, and who comes second finds it complete."""
    out, write = tmp_path / "digits", digits._write_tree
    (tmp_path / ".tmp-1-digits/train").mkdir(parents=True)
    (tmp_path / ".tmp-1-other").mkdir()

    def overtaken(folder):
        monkeypatch.setattr(digits, "_write_tree", write)
        context = multiprocessing.get_context("fork")
        other = context.Process(target=digits_main, args=(["--out", str(out)],))
        other.start()
        other.join()
        assert folder.exists(), "the other one leaves this one's folder alone"
        write(folder)

    monkeypatch.setattr(digits, "_write_tree", overtaken)
    assert digits_main(["--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"digits: {out} is complete\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-1-other", "digits"]
    assert not (out / ".lock").exists()


def test_digits_refuse_a_foreign_folder(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert digits_main(["--out", str(tmp_path)]) == 2
    assert "is not ours" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_digits_split():
    assert split_digits(np.array([1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1])) == ["train"] * 5 + ["val"] + ["train"] * 3 + [
        "val",
        "train",
    ]


def test_workers_end_when_told(tiny_cfg):
    """Also where somebody still holds the loader: the end of the process would wait for them."""
    cfg = load_config(str(tiny_cfg), ["DATA.NUM_WORKERS", "1"])
    loader = train_loader(cfg, scan_split(cfg, "train"), CPU)
    alone = train_loader(load_config(str(tiny_cfg)), scan_split(cfg, "train"), CPU)
    before = set(multiprocessing.active_children())
    next(iter(loader)), next(iter(alone))
    [worker] = set(multiprocessing.active_children()) - before
    close_workers(loader, alone)
    assert not worker.is_alive() and worker.exitcode == 0


HELD = """
import sys
from ssm_train.common.distributed import World
from ssm_train.config.load import load_config
from ssm_train.data.build import eval_loader, scan_split
import torch

cfg = load_config(sys.argv[1], ["DATA.NUM_WORKERS", "1", "DATA.BATCH_SIZE", "1"])
loader = eval_loader(cfg, scan_split(cfg, "val"), World(0, 1, torch.device("cpu")))
loaded = iter(loader)
next(loaded)
"""


def test_nobody_waits_for_workers_at_the_end(tiny_cfg):
    """Of a loader that is held when Python ends, as by a traceback: SIGTERM would take effect after a minute."""
    done = subprocess.run([sys.executable, "-c", HELD, str(tiny_cfg)], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
