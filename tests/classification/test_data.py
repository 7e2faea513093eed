"""Order and augmentation as functions of (seed, epoch, index), image folders, and the digits."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classification.config import load_config
from classification.data.build import eval_loader, scan_split, train_loader
from classification.data.dataset import BadImage, BadImages, TrainImages
from classification.data.digits import main as digits_main
from classification.data.digits import split_digits
from classification.data.samplers import EvalBatches, TrainBatches
from classification.data.transforms import eval_transform, train_transform
from classification.distributed import World
from classification.errors import UserError

CPU = World(0, 1, torch.device("cpu"))
AUGMENTED = "AUG.HFLIP 0.5 AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1 AUG.REPROB 0.5 TRAIN.EPOCHS 3"


def batches_of(loader, epoch: int = 0) -> list:
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def test_worlds_see_the_same_global_batches():
    count, batch = 103, 12
    alone = TrainBatches(count, batch, seed=5)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        expected = [set(keys) for keys in alone]
        assert len(expected) == len(alone) == 103 // 12
        seen = [index for keys in expected for _, index in keys]
        assert len(set(seen)) == len(seen)
        for size in (2, 3):
            ranks = [TrainBatches(count, batch // size, rank=r, world_size=size, seed=5) for r in range(size)]
            for sampler in ranks:
                sampler.set_epoch(epoch)
            for number, parts in enumerate(zip(*ranks, strict=True)):
                assert set().union(*map(set, parts)) == expected[number]
                assert sum(map(len, parts)) == batch
    first = list(alone)
    alone.set_epoch(0)
    assert {index for _, index in first[0]} != {index for _, index in next(iter(alone))}


def test_accumulation_keeps_whole_updates():
    sampler = TrainBatches(103, 4, world_size=2, accumulation=3, seed=0)
    assert (sampler.updates_per_epoch, len(sampler)) == (4, 12)
    big = TrainBatches(103, 24, seed=0)
    parts = [list(TrainBatches(103, 4, rank=r, world_size=2, accumulation=3, seed=0)) for r in (0, 1)]
    for number, keys in enumerate(big):
        micro = [key for rank in parts for step in rank[3 * number : 3 * number + 3] for key in step]
        assert set(micro) == set(keys) and len(micro) == 24
    with pytest.raises(UserError, match="103 images, but one optimizer update takes 104"):
        TrainBatches(103, 52, world_size=2)


def test_evaluation_sees_each_image_once():
    for count, size in ((15, 1), (15, 2), (16, 3), (2, 3)):
        keys = [key for r in range(size) for step in EvalBatches(count, 4, rank=r, world_size=size) for key in step]
        assert sorted(keys) == [(0, index) for index in range(count)]
        assert len(EvalBatches(count, 4, rank=0, world_size=size)) == math.ceil(math.ceil(count / size) / 4)


def test_augmentation_depends_on_the_key_alone(tiny_cfg):
    """Not on the number of workers, on what was drawn before, or on the neighbours in the batch."""
    cfg = load_config(str(tiny_cfg), AUGMENTED.split())
    found = scan_split(cfg, "train")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    plain = batches_of(train_loader(cfg, found, CPU), epoch=1)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
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
    joined = [
        torch.cat([a.images, b.images]) for a, b in zip(*(batches_of(half, epoch=1) for half in halves), strict=True)
    ]
    for one, other in zip(plain, joined, strict=True):
        assert torch.equal(one.images, other)
    other_epoch = batches_of(train_loader(cfg, found, CPU), epoch=2)
    assert not any(torch.equal(a.images, b.images) for a, b in zip(plain, other_epoch, strict=True))
    dataset = TrainImages(found.samples, train_transform(cfg), seed=0, max_bad=0)
    twins = TrainImages([found.samples[0]] * 2, train_transform(cfg), seed=0, max_bad=0)
    assert not torch.equal(twins[1, 0].image, twins[1, 1].image)
    same, different = (
        dataset[1, 3].image,
        TrainImages(found.samples, train_transform(cfg), seed=1, max_bad=0)[1, 3].image,
    )
    assert torch.equal(same, dataset[1, 3].image) and not torch.equal(same, different)


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
    dataset = TrainImages(found.samples, train_transform(cfg), seed=0, max_bad=3)
    neighbour = found.samples[7]
    bad = [damage(own_tree / "train/cat/5.png"), damage(own_tree / "train/cat/6.png")]
    sample = dataset[0, 5]
    assert [entry.path for entry in sample.bad] == bad and all(entry.reason for entry in sample.bad)
    assert neighbour[0].endswith("dog/0.png") and sample.target == neighbour[1] == 1
    # the last image wraps around to the first
    damage(own_tree / "train/eel/6.png")
    assert dataset[0, 20].target == 0
    missing = own_tree / "train/dog/1.png"
    missing.unlink()
    assert [entry.path for entry in dataset[0, 8].bad] == [str(missing)]


def test_too_many_bad_images_stop_all_ranks(caplog):
    bad = BadImages(CPU, 10, 2)
    for _ in range(2):
        bad.add([BadImage("a.png", "cut"), BadImage("b.png", "cut")])
        bad.share()
    assert bad.count == 2
    bad.add([BadImage("c.png", "cut")])
    with pytest.raises(UserError, match=r"3 of 10 training images .* allows 2\): a\.png, b\.png, c\.png"):
        bad.share()
    nothing_left = BadImages(CPU, 1, 100)
    nothing_left.add([BadImage("a.png", "cut")])
    with pytest.raises(UserError, match="1 of 1 training images"):
        nothing_left.share()
    validation = BadImages(CPU, 1, None)
    validation.add([BadImage("a.png", "cut")])
    validation.share()
    assert validation.count == 1


def test_bad_validation_image_leaves_the_batch(tiny_cfg, own_tree):
    cfg = load_config(str(tiny_cfg), ["DATA.DATA_PATH", str(own_tree)])
    found = scan_split(cfg, "val")
    path = damage(own_tree / "val/cat/1.png")
    batches = list(eval_loader(cfg, found, CPU))
    assert [len(batch.targets) for batch in batches] == [3, 4, 4, 3]
    assert [entry.path for entry in batches[0].bad] == [path]
    for number in range(5):
        for name in ("cat", "dog", "eel"):
            damage(own_tree / f"val/{name}/{number}.png")
    assert all(len(batch.targets) == 0 for batch in eval_loader(cfg, found, CPU))


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
