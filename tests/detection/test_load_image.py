"""Reading of images by the dense tools: as OpenCV where 8 bits say all, by a stated range or not at all elsewhere."""

import numpy as np
import pytest
from PIL import Image

mmcv = pytest.importorskip("mmcv")
pytestmark = pytest.mark.dense

from ssm_mm.load_image import LoadImageFromFile  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.fixture
def load(tmp_path):
    """load(image, suffix, **arguments of the transform) -> what it makes of {"img_path": ...}."""

    def run(image: Image.Image, suffix: str = "png", **arguments) -> dict:
        path = tmp_path / f"a.{suffix}"
        image.save(path)
        return LoadImageFromFile(**arguments).transform({"img_path": str(path)})

    return run


def test_8_bits_are_read_as_by_opencv(load, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), Image.fromarray(noise[..., 0]), Image.fromarray(noise).quantize(9)):
        for suffix, arguments in (("png", {}), ("tif", {"value_range": (0, 9)})):
            if suffix == "tif" and image.mode == "P":
                continue
            loaded = load(image, suffix, **arguments)
            assert np.array_equal(loaded["img"], mmcv.imread(str(tmp_path / f"a.{suffix}")))
            assert loaded["img"].dtype == np.uint8 and loaded["ori_shape"] == loaded["img_shape"] == (9, 7)


@pytest.mark.parametrize(
    ("kind", "suffix", "mode"), [(np.uint16, "png", "I;16"), (np.int32, "tif", "I"), (np.float32, "tif", "F")]
)
def test_more_than_8_bits(load, kind, suffix, mode):
    image = Image.fromarray(RAMP.astype(kind))
    with pytest.raises(UserError, match=rf"a.{suffix} cannot be read: an image of mode {mode} .*value_range"):
        load(image, suffix)
    with pytest.raises(UserError, match="0 to 4095, are outside of value_range 5000 to 6000"):
        load(image, suffix, value_range=(5000, 6000))
    loaded = load(image, suffix, value_range=[0, 4095])
    expected = np.round(RAMP / 4095 * 255)
    assert loaded["img"].shape == (64, 64, 3) and loaded["img"].dtype == np.uint8
    assert all(np.array_equal(loaded["img"][..., channel], expected) for channel in range(3))
    grey = load(image, suffix, value_range=(0, 4095), color_type="grayscale", to_float32=True)
    assert np.array_equal(grey["img"], expected) and grey["img"].dtype == np.float32
    if mode == "I;16":
        assert np.array_equal(load(image, suffix, color_type="unchanged")["img"], RAMP)


def test_what_is_no_range():
    with pytest.raises(UserError, match=r"value_range \(3, 3\) of LoadImageFromFile is not \(low, high\)"):
        LoadImageFromFile(value_range=(3, 3))
