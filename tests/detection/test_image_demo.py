"""detection/tools/image_demo.py: pictures of any kind, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet")
pytestmark = pytest.mark.dense

from mmengine.config import Config  # noqa: E402

from detection.tools import image_demo as tool  # noqa: E402


@pytest.fixture
def flags(task, trained):
    return ["--config", str(task.config), "--checkpoint", str(trained / "epoch_2.pth"), "--device", "cpu"]


def test_pictures_of_any_kind(flags, task, tmp_path, data, capfd):
    """Grey, alpha and, by value_range, 16-bit images are read, and the same picture gives the same drawing."""
    scene = Image.open(data / "val2017/000001.png").convert("L").convert("RGB")
    scene.save(tmp_path / "rgb.png")
    scene.convert("L").save(tmp_path / "grey.png")
    scene.convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) << 8).save(tmp_path / "deep.png")
    paths = [str(tmp_path / f"{kind}.png") for kind in ("rgb", "grey", "alpha", "deep")]
    assert tool.main([paths[-1], *flags]) == 2
    assert "deep.png cannot be read: an image of mode I;16 " in capfd.readouterr().err
    cfg = Config.fromfile(task.config)
    cfg.test_dataloader.dataset.pipeline[0].value_range = (0, 255 << 8)
    cfg.dump(tmp_path / "deep.py")
    flags = ["--config", str(tmp_path / "deep.py"), *flags[2:]]
    assert tool.main([*paths, *flags, "--score", "0.0", "--out-dir", str(tmp_path / "out")]) == 0
    drawn = [np.asarray(Image.open(tmp_path / "out" / f"{kind}.png")) for kind in ("rgb", "grey", "alpha", "deep")]
    assert drawn[0].shape == (*np.asarray(scene).shape[:2], 3) and not np.array_equal(drawn[0], np.asarray(scene))
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])


def test_mistakes(flags, tmp_path, capfd):
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    assert tool.main([str(empty), *flags]) == 2
    assert f"error: image {empty} is an empty file" in capfd.readouterr().err
    assert tool.main([str(tmp_path / "nowhere.png"), *flags]) == 2
    assert "no such image" in capfd.readouterr().err
