"""Data of marine animal segmentation: the embedded set, masks, data sets, and what is wrong with them."""

import numpy as np
import pytest
from PIL import Image

from segmentation.data.camouflage import animal_mask, camouflage
from segmentation.data.camouflage import main as write
from ssm_mm.digit_scenes import Choices, make_scene
from ssm_train.common.errors import UserError

COUNTS = {"train": 3, "test": 2}
ARGUMENTS = [f"--{split}={count}" for split, count in COUNTS.items()]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("camouflage") / "digits"
    assert write(["--out", str(out), *ARGUMENTS]) == 0
    return out


def arrays(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]


def test_layout_and_masks(digits):
    for split, scenes in (("train", "train"), ("test", "val")):
        images, masks = (arrays(digits / split / kind) for kind in ("Image", "Masks"))
        assert len(images) == len(masks) == COUNTS[split]
        for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
            expected = animal_mask(make_scene(scenes, number))
            assert np.array_equal(mask, 255 * expected.astype(np.uint8)) and 0 < expected.mean() < 0.5
            assert image.shape == (*mask.shape, 3) and image.dtype == np.uint8


def test_two_runs_write_the_same_bytes(digits, tmp_path):
    again = tmp_path / "again"
    assert write(["--out", str(again), *ARGUMENTS]) == 0
    files = [path for path in sorted(digits.rglob("*")) if path.is_file()]
    assert len(files) == 2 * (3 + 2) + 1
    assert all((again / path.relative_to(digits)).read_bytes() == path.read_bytes() for path in files)


def test_digits_are_camouflaged_under_water():
    """Blue and green over red; and brightness alone, at any threshold, does not find the digits."""
    reds, best = [], []
    for number in range(12):
        mask = animal_mask(make_scene("train", number))
        image = camouflage(mask, Choices(f"test/{number}")).astype(float)
        reds.append(image[..., 0].mean() / image[..., 1:].mean())
        grey = image.mean(-1)
        overlaps = [
            (found & mask).sum() / (found | mask).sum()
            for level in np.percentile(grey, range(2, 100, 2))
            for found in (grey >= level, grey < level)
        ]
        best.append(max(overlaps))
    assert max(reds) < 0.75 and np.mean(best) < 0.6


def test_wrong_numbers(capsys, tmp_path):
    assert write(["--out", str(tmp_path / "x"), "--test=0"]) == 2
    assert "--test 0: must be at least 1" in capsys.readouterr().err


# ---- with mmsegmentation ----


@pytest.fixture
def mm():
    pytest.importorskip("mmseg")
    return pytest.importorskip("segmentation.dual_sam.transforms")


def saved(path, array):
    Image.fromarray(array).save(path)
    return path


@pytest.mark.dense
def test_masks_that_are_read(mm, tmp_path):
    truth = np.zeros((6, 7), np.uint8)
    truth[2:4, 1:5] = 1
    grey = truth * 255
    grey[2, 1], grey[0, 0] = 130, 90  # smoothed edges
    for name, array in {
        "ones.png": truth,
        "white.bmp": truth * 255,
        "grey.png": grey,
        "bool.png": truth.astype(bool),
        "colour.png": np.repeat(truth[..., None] * 255, 3, -1),
        "alpha.png": np.dstack([*[truth * 255] * 3, np.full_like(truth, 255)]),
    }.items():
        assert np.array_equal(mm.read_mask(saved(tmp_path / name, array)), truth), name
    assert not mm.read_mask(saved(tmp_path / "no animal.png", 0 * truth)).any()


@pytest.mark.dense
def test_masks_that_are_refused(mm, tmp_path):
    truth = np.zeros((6, 7), np.uint8)
    truth[2:4, 1:5] = 3
    with pytest.raises(UserError, match=r"classes.png has values up to 3: it must have 0 and 1, or 0 and 255"):
        mm.read_mask(saved(tmp_path / "classes.png", truth))
    colours = np.zeros((6, 7, 3), np.uint8)
    colours[..., 0] = 255
    with pytest.raises(UserError, match="colours.png is in colours"):
        mm.read_mask(saved(tmp_path / "colours.png", colours))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="text.png cannot be read"):
        mm.read_mask(tmp_path / "text.png")
    results = {"seg_map_path": str(saved(tmp_path / "small.png", truth // 3)), "img_path": "a.jpg", "seg_fields": []}
    with pytest.raises(UserError, match=r"small.png has 7x6 pixels, its image a.jpg 8x6: they must be of one size"):
        mm.LoadBinaryMask().transform({**results, "ori_shape": (6, 8)})
    assert mm.LoadBinaryMask().transform({**results, "ori_shape": (6, 7)})["gt_seg_map"].max() == 1


@pytest.mark.dense
def test_both_views_in_one_image(mm):
    from segmentation.dual_sam.gamma import gamma_copy

    image = np.random.default_rng(0).integers(0, 90, (5, 6, 3), dtype=np.uint8)
    both = mm.GammaCopy().transform({"img": image})["img"]
    assert np.array_equal(both[..., :3], image[..., ::-1]) and np.array_equal(
        both[..., 3:], gamma_copy(image)[..., ::-1]
    )


@pytest.mark.dense
def test_pairs_of_images_and_masks(mm, tmp_path):
    from segmentation.dual_sam.dataset import MarineDataset

    def dataset():
        prefix = {"img_path": "Image", "seg_map_path": "Masks"}
        return MarineDataset(data_root=str(tmp_path), data_prefix=prefix, pipeline=[])

    for kind in ("Image", "Masks"):
        (tmp_path / kind).mkdir()
    with pytest.raises(UserError, match="Image has no files of .jpg"):
        dataset()
    for name in ("b.jpg", "a.png", "c.JPG"):
        (tmp_path / "Image" / name).touch()
    for name in ("a.png", "b.bmp"):
        (tmp_path / "Masks" / name).touch()
    with pytest.raises(UserError, match="1 of 3 images without mask: c.JPG"):
        dataset()
    (tmp_path / "Masks/c.png").touch()
    found = [dataset().get_data_info(i) for i in range(3)]
    assert [info["img_path"].rsplit("/")[-1] for info in found] == ["a.png", "b.jpg", "c.JPG"]
    assert [info["seg_map_path"].rsplit("/")[-1] for info in found] == ["a.png", "b.bmp", "c.png"]
    assert dataset().metainfo["classes"] == ("background", "animal")
    (tmp_path / "Masks/d.png").touch()
    with pytest.raises(UserError, match="1 of 4 masks without image: d.png"):
        dataset()
    (tmp_path / "Image/a.jpg").touch()
    with pytest.raises(UserError, match="a.jpg and a.png: names must be unique"):
        dataset()
