"""Scenes of digits and their COCO form: masks, boxes, splits, and a folder that is complete or refused."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from detection.data.digit_scenes import main, run_lengths
from ssm_mm import digit_scenes
from ssm_mm.digit_scenes import DIGITS, FEWEST, MIN_VISIBLE, MOST, Choices, Instance, box_of, make_scene, scans_of
from ssm_train.data.digits import split_digits

COUNTS = {"train": 6, "val": 4}
ARGUMENTS = [f"--{split}={count}" for split, count in COUNTS.items()]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A small data set."""
    out = tmp_path_factory.mktemp("scenes") / "coco"
    assert main(["--out", str(out), *ARGUMENTS]) == 0
    return out


@pytest.fixture(scope="module")
def scenes():
    return {split: [make_scene(split, number) for number in range(30)] for split in COUNTS}


def content(out, split):
    return json.loads((out / "annotations" / f"instances_{split}2017.json").read_text())


def decode(code):
    """The mask of COCO's uncompressed run lengths."""
    height, width = code["size"]
    pixels = np.repeat(np.arange(len(code["counts"])) % 2, code["counts"])
    return pixels.reshape(width, height).T.astype(bool)


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_choices_are_hashes_and_fill_their_range():
    bits = [int(hashlib.sha256(f"a key/{i}".encode()).hexdigest()[:16], 16) for i in range(3)]
    choices = Choices("a key")
    assert [choices.between(-5, 4) for _ in range(3)] == [-5 + 10 * b // 2**64 for b in bits] == [-5, -5, 4]
    drawn = [choices.of("xyz") for _ in range(300)]
    assert all(80 < drawn.count(letter) < 120 for letter in "xyz")


def test_split_is_that_of_the_classification():
    targets = load_digits().target
    splits = split_digits(targets)
    for split, digit in itertools.product(COUNTS, range(10)):
        expected = [i for i, of in enumerate(targets) if of == digit and splits[i] == split]
        assert list(scans_of(split, digit)) == expected
    assert sum(len(scans_of("val", digit)) for digit in range(10)) == 355


def test_scenes_hold_three_to_eight_digits_of_their_own_split(scenes):
    targets = load_digits().target
    splits = np.array(split_digits(targets))
    for split, of_split in scenes.items():
        counts = {len(scene.instances) for scene in of_split}
        assert counts == set(range(FEWEST, MOST + 1))
        instances = [instance for scene in of_split for instance in scene.instances]
        assert {instance.digit for instance in instances} == set(range(10))
        for instance in instances:
            assert targets[instance.scan] == instance.digit and splits[instance.scan] == split
        assert len({scene.image.shape for scene in of_split}) == 9
        assert {side for scene in of_split for side in scene.image.shape[:2]} == {128, 144, 160}


def test_masks_are_disjoint_and_at_most_two_fifths_of_a_digit_are_hidden(scenes):
    hidden = 0
    for scene in scenes["train"] + scenes["val"]:
        masks = [instance.mask for instance in scene.instances]
        assert np.sum(masks, axis=0).max() == 1
        shares = [instance.mask.sum() / instance.ink for instance in scene.instances]
        assert min(shares) >= MIN_VISIBLE and shares[-1] == 1
        hidden += sum(share < 1 for share in shares)
        tallest = [box_of(mask)[3] for mask, share in zip(masks, shares, strict=True) if share == 1]
        assert min(tallest) >= 20 and max(tallest) <= 56
    assert hidden > 30  # there is occlusion


def test_masks_lie_on_the_bright_pixels(scenes):
    for scene in scenes["train"]:
        luma = scene.image @ np.array([0.299, 0.587, 0.114])
        inked = np.any([instance.mask for instance in scene.instances], axis=0)
        assert luma[~inked].mean() < 60
        for instance in scene.instances:
            assert luma[instance.mask].mean() > 90
        bright = luma > 115  # brighter than canvas and half-covered pixels
        assert (inked & bright).sum() > 0.95 * bright.sum()


def test_the_front_digit_hides_those_behind(monkeypatch):
    painted, paint = [], digit_scenes._paint
    monkeypatch.setattr(
        digit_scenes, "_paint", lambda image, ink, colour: painted.append(ink) or paint(image, ink, colour)
    )
    for number in range(20):
        painted.clear()
        instances = make_scene("train", number).instances
        inks = [coverage >= 96 for coverage in painted]
        for i, (instance, ink) in enumerate(zip(instances, inks, strict=True)):
            assert instance.ink == ink.sum()
            assert np.array_equal(instance.mask, ink & ~np.any(inks[i + 1 :], axis=0))


def test_what_is_legible():
    old, new = np.zeros((2, 40, 40), bool)
    old[:10, :10] = True
    new[30:, 30:] = True
    for visible, legible in ((59, False), (60, True)):
        behind = old & (np.arange(old.size).reshape(old.shape) < 40 * (visible // 10) + visible % 10)
        before, after = Instance(0, 0, old, 100), Instance(0, 0, behind, 100)
        assert behind.sum() == visible and digit_scenes._is_legible(new, [before], [after]) == legible
    for left, legible in ((6, False), (7, True)):  # a box of 20x10 that shares 40 or 30 of the 100 pixels of the other
        new[:] = False
        new[:20, left : left + 10] = True
        assert digit_scenes._is_legible(new, [before], [before]) == legible


def test_the_stream_of_scenes_is_version_one():
    # the first digit of a scene needs no arithmetic on pixels: another Pillow gives the same
    assert [make_scene("train", number).instances[0][:2] for number in range(4)] == [
        (1, 1508),
        (2, 1742),
        (0, 1029),
        (6, 532),
    ]
    assert [make_scene("val", number).instances[0][:2] for number in range(4)] == [
        (1, 1334),
        (4, 507),
        (9, 1740),
        (0, 386),
    ]


def test_a_scene_does_not_depend_on_the_others():
    image = make_scene("val", 5).image
    assert np.array_equal(make_scene("val", 5).image, image)
    for split, number in (("val", 6), ("train", 5)):
        other = make_scene(split, number).image
        assert other.shape != image.shape or not np.array_equal(other, image)
    with pytest.raises(ValueError, match="'test' is not one of train, val"):
        make_scene("test", 0)


def test_run_lengths():
    mask = np.array([[0, 1, 1], [1, 1, 0]], bool)
    assert run_lengths(mask) == {"size": [2, 3], "counts": [1, 4, 1]}
    assert run_lengths(~mask) == {"size": [2, 3], "counts": [0, 1, 4, 1]}
    assert run_lengths(np.ones((2, 2), bool))["counts"] == [0, 4]
    mask = make_scene("train", 0).instances[0].mask
    assert np.array_equal(decode(run_lengths(mask)), mask)


def test_box():
    mask = np.zeros((5, 7), bool)
    mask[1, 2] = mask[3, 5] = True
    assert box_of(mask) == (2, 1, 4, 3)


@pytest.mark.parametrize("split", COUNTS)
def test_annotations_describe_the_scenes(coco, split):
    data = content(coco, split)
    assert [(c["id"], c["name"]) for c in data["categories"]] == [(i + 1, str(i)) for i in range(10)]
    assert [image["id"] for image in data["images"]] == list(range(1, COUNTS[split] + 1))
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    assert {path.name for path in (coco / f"{split}2017").iterdir()} == {i["file_name"] for i in data["images"]}
    for number, entry in enumerate(data["images"]):
        scene = make_scene(split, number)
        image = Image.open(coco / f"{split}2017" / entry["file_name"])
        assert image.mode == "RGB" and image.size == (entry["width"], entry["height"])
        assert np.array_equal(np.asarray(image), scene.image)
        annotations = [a for a in data["annotations"] if a["image_id"] == entry["id"]]
        for annotation, instance in zip(annotations, scene.instances, strict=True):
            mask = decode(annotation["segmentation"])
            assert np.array_equal(mask, instance.mask)
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            assert annotation["category_id"] == instance.digit + 1 and annotation["scan"] == instance.scan


def test_no_scan_is_in_both_splits(coco):
    seen = [{annotation["scan"] for annotation in content(coco, split)["annotations"]} for split in COUNTS]
    assert all(seen) and not seen[0] & seen[1]


def test_two_runs_write_the_same_bytes_and_fewer_scenes_are_the_first_ones(coco, tmp_path):
    again, fewer = tmp_path / "again", tmp_path / "fewer"
    assert main(["--out", str(again), *ARGUMENTS]) == main(["--out", str(fewer), "--train=2", "--val=1"]) == 0
    assert files(again) == files(coco)
    some, all_ = files(fewer), files(coco)
    images = [name for name in some if name.endswith(".png")]
    assert len(images) == 3 and all(some[name] == all_[name] for name in images)


def test_written_once_and_verified(tmp_path, capsys):
    out = tmp_path / "coco"
    assert main(["--out", str(out), "--train=2", "--val=1"]) == 0
    before = files(out)
    assert len(before) == 2 + 1 + 2 + 1
    assert main(["--out", str(out), "--train=2", "--val=1"]) == 0
    assert capsys.readouterr().out == f"digit scenes: {out} written\ndigit scenes: {out} is complete\n"
    assert files(out) == before and [path.name for path in tmp_path.iterdir()] == ["coco"]

    assert main(["--out", str(out), "--train=3", "--val=1"]) == 2
    assert "train 2, val 1, but layout COCO, train 3, val 1 is asked for" in capsys.readouterr().err
    changed = out / "val2017" / "000001.png"
    changed.write_bytes(changed.read_bytes()[:-1])
    assert main(["--out", str(out), "--train=2", "--val=1"]) == 2
    assert f"{changed} is missing or was changed: delete {out}" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", [None, "[]", "{}", "torn {", '{"files": 3}'])
def test_a_foreign_folder_is_refused(tmp_path, capsys, manifest):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    if manifest is not None:
        (tmp_path / "digit_scenes.json").write_text(manifest)
    before = files(tmp_path)
    assert main(["--out", str(tmp_path), *ARGUMENTS]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not empty and holds no readable digit_scenes.json" in error
    assert files(tmp_path) == before


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("a file")
    for out, reason in ((tmp_path / "file", "Not a directory"), (tmp_path / "file" / "below", "Not a directory")):
        assert main(["--out", str(out), "--train=1", "--val=1"]) == 2
        assert capsys.readouterr().err == f"error: cannot write the scenes to {out}: {reason}\n"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["--out", ".", "--train=1", "--val=1"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write the scenes to .: ")
    assert main(["--out", str(tmp_path / "new"), "--train=0"]) == 2
    assert capsys.readouterr().err == "error: --train 0: must be at least 1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.dense
def test_pycocotools_scores_the_truth_as_perfect(coco):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(coco / "annotations" / "instances_val2017.json"))
    annotations = truth.loadAnns(truth.getAnnIds())
    assert len(annotations) == sum(len(make_scene("val", number).instances) for number in range(COUNTS["val"]))
    results = []
    for annotation in annotations:
        code = truth.annToRLE(annotation)
        assert np.array_equal(truth.annToMask(annotation), decode(annotation["segmentation"]))
        found = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        results.append({**found, "segmentation": code, "score": 0.9})
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


@pytest.mark.dense
def test_mmdet_reads_boxes_labels_and_masks(coco):
    pytest.importorskip("mmdet")
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules

    register_all_modules()
    dataset = CocoDataset(
        data_root=str(coco),
        ann_file="annotations/instances_train2017.json",
        data_prefix={"img": "train2017/"},
        metainfo={"classes": DIGITS},
        filter_cfg={"filter_empty_gt": True, "min_size": 32},
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}],
    )
    assert len(dataset) == COUNTS["train"]
    for number in range(len(dataset)):
        loaded, scene = dataset[number], make_scene("train", number)
        assert np.array_equal(loaded["img"][..., ::-1], scene.image)
        assert loaded["gt_bboxes_labels"].tolist() == [instance.digit for instance in scene.instances]
        assert np.array_equal(loaded["gt_masks"].masks, [instance.mask for instance in scene.instances])
        boxes = [box_of(instance.mask) for instance in scene.instances]
        assert loaded["gt_bboxes"].tensor.tolist() == [[x, y, x + w, y + h] for x, y, w, h in boxes]
        assert not loaded["gt_ignore_flags"].any()
