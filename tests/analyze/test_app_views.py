"""What the page of analyze/app.py shows, without the page: the commands that it names make the same pictures, and how
often a model is run for a click."""

import importlib
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from analyze import app as app_command
from analyze.figures import save_figure
from analyze.impl import app, app_views
from ssm_train.common.errors import UserError

CPU = ["--device", "cpu"]


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "a photo.png"  # with a space: commands are quoted
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> dict[str, app_views.Shown]:
    """Nano models with random weights, and one with weights from a file, at another size than its own."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(timm.create_model("vssd_nano").state_dict(), file)
    given = ["--model", "vssd_nano", "--checkpoint", str(file), "--size", "48", "--which", "model"]
    return app.choices_of(app_command.parser().parse_args([*CPU, *given]))


def run_command(line: str, out: Path) -> None:
    """Does what `python analyze/NAME.py ...` does."""
    python, script, *options = shlex.split(line)
    assert python == "python"
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    assert main([*options, *CPU, "--out", str(out)]) == 0


@pytest.mark.parametrize(
    "label", ["vssd_nano, net.pth", pytest.param("vim_nano, random weights", marks=pytest.mark.full)]
)
def test_commands_make_the_pictures_of_the_page(label, choices, photo, tmp_path):
    shown = choices[label]
    stage, block, mode = (2, 0, "softmax") if label.startswith("vssd") else (0, 3, "CwBdtw")
    look = app_views.attention(shown, photo, (10, 20), stage, block, mode)
    found = app_views.answer(shown, photo)
    pictures = {"attnmap": (look.figure, look.command), "cam": (found.figure, found.command)}
    pictures["erf"] = app_views.field(shown, photo)
    for name, (figure, command) in pictures.items():
        save_figure(figure, tmp_path / "page" / f"{name}.png")
        run_command(command, tmp_path / "command" / f"{name}.png")
        for suffix in (".png", ".pdf"):
            mine, theirs = ((tmp_path / folder / f"{name}{suffix}").read_bytes() for folder in ("page", "command"))
            assert mine == theirs, (name, suffix)


def test_a_click_is_one_pass_and_builds_nothing(choices, photo, monkeypatch):
    shown = choices["vssd_nano, net.pth"]
    app_views.field(shown, photo)  # builds the model with random weights beside it, once
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a model is built"))
    passes = []
    with monkeypatch.context() as patch:
        forward = type(shown.model).forward
        patch.setattr(type(shown.model), "forward", lambda self, x: passes.append(tuple(x.shape)) or forward(self, x))
        app_views.attention(shown, photo, (10, 20), 0, 0, "CwBdtw")
        assert passes == [(1, 3, 48, 64)]
        passes.clear()
        app_views.answer(shown, photo)
        assert len(passes) == 2  # the classes, and once with a gradient
        app_views.field(shown, photo)


def test_a_pixel_outside_is_refused(choices, photo):
    with pytest.raises(UserError, match="--query 64 0 is outside of the image, which has 64x48 pixels"):
        app_views.attention(choices["vim_nano, random weights"], photo, (64, 0), 0, 0, "ww")
