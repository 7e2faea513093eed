"""Digit scenes in COCO format: what the files say of the scenes, and how pycocotools and mmdet read them."""

import json

import numpy as np
import pytest
from PIL import Image

from detection.data.digit_scenes import main, run_lengths
from ssm_mm.digit_scenes import DIGITS, box_of, make_scene

COUNTS = {"train": 6, "val": 4}
ARGUMENTS = [f"--{split}={count}" for split, count in COUNTS.items()]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A small data set."""
    out = tmp_path_factory.mktemp("scenes") / "coco"
    assert main(["--out", str(out), *ARGUMENTS]) == 0
    return out


def content(out, split):
    return json.loads((out / "annotations" / f"instances_{split}2017.json").read_text())


def decode(code):
    """The mask of COCO's uncompressed run lengths."""
    height, width = code["size"]
    pixels = np.repeat(np.arange(len(code["counts"])) % 2, code["counts"])
    return pixels.reshape(width, height).T.astype(bool)


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_run_lengths():
    mask = np.array([[0, 1, 1], [1, 1, 0]], bool)
    assert run_lengths(mask) == {"size": [2, 3], "counts": [1, 4, 1]}
    assert run_lengths(~mask) == {"size": [2, 3], "counts": [0, 1, 4, 1]}
    assert run_lengths(np.ones((2, 2), bool))["counts"] == [0, 4]
    mask = make_scene("train", 0).instances[0].mask
    assert np.array_equal(decode(run_lengths(mask)), mask)


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
