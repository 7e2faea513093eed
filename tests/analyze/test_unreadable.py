"""Commands on folders with images that cannot be read, and with outputs that cannot be written."""

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from analyze import cam, erf, export, predict


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vim.safetensors"
    save_file(timm.create_model("vim_nano").state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """One image, an empty file and a text."""
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3)).astype(np.uint8)).save(images / "good.png")
    (images / "empty.png").touch()
    (images / "text.jpg").write_text("no picture")
    return images


def line(tool, weights, images, out):
    if tool is erf:
        return ["--models", "vim_nano", "--checkpoints", str(weights), "--size", "32", "--images", images, "--out", out]
    return ["--model", "vim_nano", "--checkpoint", str(weights), "--images", images, "--out", out]


TOOLS = [pytest.param(tool, id=tool.__name__) for tool in (cam, erf, predict)] + [
    pytest.param(export, id="export", marks=pytest.mark.full)
]


@pytest.mark.parametrize("tool", TOOLS)
def test_the_rest_is_done(tool, weights, folder, tmp_path, capsys):
    """Each is named once, and the exit status says that something was left out."""
    out = tmp_path / ("out.onnx" if tool is export else "out.png")
    assert tool.main(line(tool, weights, str(folder), str(out))) == 1
    said = capsys.readouterr().err
    assert out.stat().st_size > 1000 and "good.png" not in said
    assert said.count("empty.png cannot be read as an image") == said.count("text.jpg cannot be read") == 1
    (folder / "good.png").unlink()
    assert tool.main(line(tool, weights, str(folder), str(out))) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[2].startswith("error: none of the 2 images is readable, e.g. "), said


@pytest.mark.parametrize("tool", [cam, erf, predict, export])
def test_outputs_are_checked_before_the_work(tool, weights, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("analyze.inputs.load_model", lambda *_: pytest.fail("the work has begun"))
    suffix = ".onnx" if tool is export else ".png"
    taken, file = tmp_path / f"taken{suffix}", tmp_path / "file"
    taken.mkdir()
    file.touch()
    for out, words in ((taken, "is a folder"), (file / f"a{suffix}", f"{file} is no folder that can be written to")):
        assert tool.main(line(tool, weights, str(folder), str(out))) == 2
        [said] = capsys.readouterr().err.splitlines()
        assert said.startswith(f"error: --out {out}") and words in said
