"""Scenes of digits in the layout of ADE20K: the same scenes as in COCO format, as one map of classes each."""

import json

import numpy as np
import pytest
from PIL import Image

from detection.data.digit_scenes import main as write_coco
from segmentation.data.digit_scenes import label_map
from segmentation.data.digit_scenes import main as write_ade
from ssm_mm.digit_scenes import DIGITS, Instance, Scene, make_scene

COUNTS = {"train": 4, "val": 3}
ARGUMENTS = [f"--{split}={count}" for split, count in COUNTS.items()]
FOLDERS = {"train": "training", "val": "validation"}


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    """A small data set."""
    out = tmp_path_factory.mktemp("scenes") / "ade"
    assert write_ade(["--out", str(out), *ARGUMENTS]) == 0
    return out


def test_label_map():
    first, second = np.zeros((2, 2, 3), bool)
    first[0, :2] = second[1, 2] = True
    instances = (Instance(0, 10, first, 2), Instance(9, 9, second, 1))
    assert label_map(Scene(np.zeros((2, 3, 3), np.uint8), instances)).tolist() == [[2, 2, 1], [1, 1, 11]]


@pytest.mark.parametrize("split", COUNTS)
def test_layout_and_classes(ade, split):
    images, annotations = (sorted((ade / kind / FOLDERS[split]).iterdir()) for kind in ("images", "annotations"))
    names = [f"{number:06d}.png" for number in range(1, COUNTS[split] + 1)]
    assert [path.name for path in images] == [path.name for path in annotations] == names
    for number, (image, annotation) in enumerate(zip(images, annotations, strict=True)):
        picture, labels = Image.open(image), Image.open(annotation)
        assert picture.mode == "RGB" and labels.mode == "L" and picture.size == labels.size
        digits = {instance.digit for instance in make_scene(split, number).instances}
        assert set(np.unique(labels).tolist()) == {1} | {2 + digit for digit in digits}


def test_same_scenes_and_classes_as_in_coco_format(ade, tmp_path):
    coco = tmp_path / "coco"
    assert write_coco(["--out", str(coco), *ARGUMENTS]) == 0
    for split, folder in FOLDERS.items():
        data = json.loads((coco / "annotations" / f"instances_{split}2017.json").read_text())
        for image in data["images"]:
            name = image["file_name"]
            assert (ade / "images" / folder / name).read_bytes() == (coco / f"{split}2017" / name).read_bytes()
            labels = np.ones((image["height"], image["width"]), np.uint8)
            for annotation in data["annotations"]:
                if annotation["image_id"] == image["id"]:
                    counts = annotation["segmentation"]["counts"]
                    mask = np.repeat(np.arange(len(counts)) % 2, counts).reshape(labels.T.shape).T.astype(bool)
                    labels[mask] = 1 + annotation["category_id"]
            assert np.array_equal(np.asarray(Image.open(ade / "annotations" / folder / name)), labels)


def test_two_runs_write_the_same_bytes(ade, tmp_path):
    again = tmp_path / "again"
    assert write_ade(["--out", str(again), *ARGUMENTS]) == 0
    files = [path for path in sorted(ade.rglob("*")) if path.is_file()]
    assert len(files) == 2 * (4 + 3) + 1
    assert all((again / path.relative_to(ade)).read_bytes() == path.read_bytes() for path in files)


def test_the_other_layout_is_not_taken_for_this_one(ade, capsys):
    assert write_ade(["--out", str(ade), *ARGUMENTS]) == 0
    assert write_coco(["--out", str(ade), *ARGUMENTS]) == 2
    assert "holds layout ADE20K, train 4, val 3, but layout COCO, train 4, val 3" in capsys.readouterr().err


@pytest.mark.dense
def test_mmseg_reads_eleven_classes(ade):
    pytest.importorskip("mmseg")
    from mmseg.datasets import BaseSegDataset
    from mmseg.utils import register_all_modules

    register_all_modules()
    dataset = BaseSegDataset(
        data_root=str(ade),
        data_prefix={"img_path": "images/training", "seg_map_path": "annotations/training"},
        img_suffix=".png",
        metainfo={"classes": ("background", *DIGITS)},
        reduce_zero_label=True,
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "reduce_zero_label": True}],
    )
    assert len(dataset) == COUNTS["train"] and len(dataset.metainfo["palette"]) == 11
    for number in range(len(dataset)):
        loaded, scene = dataset[number], make_scene("train", number)
        assert np.array_equal(loaded["img"][..., ::-1], scene.image)
        expected = np.zeros(scene.image.shape[:2], int)  # the background is class 0 here
        for instance in scene.instances:
            expected[instance.mask] = instance.digit + 1
        assert np.array_equal(loaded["gt_seg_map"], expected)
