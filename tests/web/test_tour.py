"""docs/tour.ipynb, run from its first cell to its last, and compared with the outputs that are committed in it."""

import base64
import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.web

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"
CELLS = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
VARIES = re.compile(r"top-1|right$")
"""Of lines with numbers of a training."""


class Ran(NamedTuple):
    printed: list[str]
    """By cell."""
    pictures: list[list[Image.Image]]
    names: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    """In this process, as Python without Jupyter: the notebook has no magic commands."""
    shown: list[Image.Image] = []
    names = {"display": lambda image, include: shown.append(image)}
    printed, pictures, before = [], [], Path.cwd()
    folder = tmp_path_factory.mktemp("tour")
    os.chdir(folder)
    try:
        for number, cell in enumerate(CELLS):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            printed.append(out.getvalue())
            pictures.append(shown.copy())
            shown.clear()
    finally:
        os.chdir(before)
    return Ran(printed, pictures, names, folder)


def committed_text(cell: dict[str, Any]) -> str:
    return "".join("".join(out["text"]) for out in cell["outputs"] if out.get("name") == "stdout")


def committed_pictures(cell: dict[str, Any]) -> list[Image.Image]:
    data = [out["data"]["image/jpeg"] for out in cell["outputs"] if "image/jpeg" in out.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in data]


def test_it_was_committed_as_it_ran():
    """In order, without an error or a warning, small, with pictures, and without a trace of the machine."""
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [out for cell in CELLS for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} == {"stream", "display_data"}
    assert not any("Warning" in "".join(out.get("text", "")) for out in outputs)
    text = TOUR.read_text()
    assert len(text) < 400_000 and not re.search(r"/(home|root|tmp|work)/|site-packages", text)
    pictures = [picture for cell in CELLS for picture in committed_pictures(cell)]
    assert len(pictures) == 3
    for picture in pictures:
        assert min(picture.size) > 150 and np.asarray(picture).std() > 20


def test_it_prints_what_is_committed(ran):
    """All but the accuracies of its trainings."""
    lines = 0
    for cell, printed in zip(CELLS, ran.printed, strict=True):
        kept = [line for line in committed_text(cell).splitlines() if not VARIES.search(line)]
        assert [line for line in printed.splitlines() if not VARIES.search(line)] == kept
        lines += len(kept)
        assert len(printed.splitlines()) == len(committed_text(cell).splitlines())
    assert lines >= 10


def test_its_pictures_are_those_that_are_committed(ran):
    sizes = [[picture.size for picture in of_cell] for of_cell in ran.pictures]
    assert sizes == [[picture.size for picture in committed_pictures(cell)] for cell in CELLS]
    # the attention of a model without training is the same everywhere
    [number] = [number for number, cell in enumerate(CELLS) if "attention_maps(" in "".join(cell["source"])]
    [now], [then] = ran.pictures[number], committed_pictures(CELLS[number])
    difference = np.asarray(now.convert("L"), dtype=int) - np.asarray(then.convert("L"), dtype=int)
    assert abs(difference).mean() < 4


def test_what_it_trains_has_learnt(ran):
    before, tuned = ran.names["before"], ran.names["tuned"]
    assert (before["images"], tuned["images"]) == (355, 100)
    assert before["top1"] > 60 and tuned["top1"] > 85  # by chance 10 and 50
    assert tuned["pretrained"]["name"] == "runs/tour/digits" and tuned["pretrained"]["fresh_classifier"]
    assert ran.names["right"] == round(tuned["top1"])
    train, val = (sorted((ran.folder / "runs/tour/photographs" / split).iterdir()) for split in ("train", "val"))
    assert [path.name for path in train] == [path.name for path in val] == ["china", "flower"]


def test_what_it_exports_agrees(ran):
    assert "ONNX Runtime agrees: True" in ran.printed[-1]
    assert "the folder agrees: True ['china', 'flower']" in ran.printed[-1]
