"""segmentation/tools/image_demo.py: pictures of the classes."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")
pytestmark = pytest.mark.dense

from segmentation.tools import image_demo as tool  # noqa: E402


def test_pictures(task, trained, data, tmp_path):
    image = data / "images/validation/000001.png"
    flags = ["--config", str(task.config), "--checkpoint", str(trained / "iter_4.pth"), "--device", "cpu"]
    assert tool.main([str(image), *flags, "--out-dir", str(tmp_path)]) == 0
    drawn, original = (np.asarray(Image.open(path)) for path in (tmp_path / image.name, image))
    assert drawn.shape == original.shape and not np.array_equal(drawn, original)
