"""analyze/app.py through a real browser: what it shows is what the commands compute, and what it refuses."""

import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="pip install -r requirements-web.txt")

from analyze import app as app_command  # noqa: E402
from analyze.impl import app, app_page, app_views  # noqa: E402

pytestmark = pytest.mark.web


class Served(NamedTuple):
    address: str
    choices: dict[str, app_views.Shown]
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page with nano models of random weights."""
    folder = tmp_path_factory.mktemp("page")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(folder / "served"))
    patch.chdir(tmp_path_factory.mktemp("elsewhere"))
    choices = app.choices_of(app_command.parser().parse_args(["--device", "cpu", "--model", "vmamba_nano"]))
    sample = folder / "sample.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)).save(sample)
    page = app_page.build(choices, {"sample.png": sample}, folder / "figures")
    _, address, _ = app_page.launch(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    yield Served(address, choices, folder)
    page.close()
    assert list(Path.cwd().iterdir()) == []  # nothing is written but in the temporary folder
    patch.undo()


@pytest.fixture
def page(browser, served):
    page = browser.new_page(viewport={"width": 1400, "height": 1100})
    page.set_default_timeout(60_000)
    page.goto(served.address)
    page.wait_for_selector("#cam0 img")  # the last that is made
    yield page
    page.close()


def photo(folder: Path) -> Path:
    path = folder / "photo.png"
    ramp = np.add.outer(np.arange(120), np.arange(200)) % 256
    Image.fromarray(np.stack([ramp, ramp.T.repeat(2, 1)[:120, :200], 255 - ramp], 2).astype(np.uint8)).save(path)
    return path


def numbers(page, column: int) -> list[list[str]]:
    """The rows of the table, below its head."""
    text = page.locator(f"#numbers{column}").inner_text().rpartition(app_page.HEADS[-1])[2]
    cells = [line.strip() for line in text.splitlines() if line.strip()]
    return [cells[i : i + len(app_page.HEADS)] for i in range(0, len(cells), len(app_page.HEADS))]


def wait_for_numbers(page, column: int, expected: list[list[str]]) -> None:
    found = None
    for _ in range(120):
        found = numbers(page, column)
        if found == expected:
            return
        page.wait_for_timeout(500)
    assert found == expected


def expected_numbers(shown, path, query, stage, block, mode) -> list[list[str]]:
    found = app_views.attention(shown, path, query, stage, block, mode)
    return [[name, *(f"{value:.6g}" for value in values)] for name, *values in found.rows]


def choose(page, control: str, option: str) -> None:
    page.click(f"#{control} input")
    page.get_by_role("option", name=option, exact=True).click()


def test_an_image_a_pixel_a_block(page, served, tmp_path):
    """Upload, click, another block and mode: each time the numbers are those of analyze/attention.py for that place."""
    path, first = photo(tmp_path), next(iter(served.choices.values()))
    page.set_input_files("#upload input[type=file]", path)
    wait_for_numbers(page, 0, expected_numbers(first, path, (100, 60), 0, 0, "CwBdtw"))
    # half-way from the middle to the upper left corner
    picture = page.locator("#picture img")
    box, sides = picture.bounding_box(), (200, 120)
    scale = min(1, box["width"] / sides[0], box["height"] / sides[1])  # it is centred in its box
    x, y = (box[side] / 2 - scale * pixels / 4 for side, pixels in zip(("width", "height"), sides, strict=True))
    picture.click(position={"x": x, "y": y})
    page.wait_for_function("document.querySelector('#x input').value < 60")
    query = tuple(int(page.locator(f"#{axis} input").input_value()) for axis in "xy")
    assert abs(query[0] - 50) <= 2 and abs(query[1] - 30) <= 2
    wait_for_numbers(page, 0, expected_numbers(first, path, query, 0, 0, "CwBdtw"))
    choose(page, "model0", "vim_nano, random weights")
    first = served.choices["vim_nano, random weights"]
    wait_for_numbers(page, 0, expected_numbers(first, path, query, 0, 5, "CwBdtw"))
    page.locator("#block0 input[type=number]").fill("2")
    wait_for_numbers(page, 0, expected_numbers(first, path, query, 0, 2, "CwBdtw"))
    choose(page, "mode0", "ww")
    wait_for_numbers(page, 0, expected_numbers(first, path, query, 0, 2, "ww"))
    shown = page.locator("#command0").inner_text().replace("\n", "")
    assert f"--query {query[0]} {query[1]} --stage 0 --block 2 --mode ww" in shown
    assert "analyze/attnmap.py --model vim_nano --images photo.png " in shown  # not where the upload lies
    shares = app_views.answer(first, path).shares
    assert list(shares)[0] in page.locator("#classes0").inner_text()


def test_two_models_side_by_side(page, served):
    sample = next(iter(served.folder.glob("sample.png")))
    assert not page.locator("#numbers1").is_visible()
    choose(page, "model1", "vim_nano, random weights")
    wait_for_numbers(
        page, 1, expected_numbers(served.choices["vim_nano, random weights"], sample, (40, 24), 0, 5, "CwBdtw")
    )
    choose(page, "model1", "vssd_nano, random weights")
    shown = served.choices["vssd_nano, random weights"]
    wait_for_numbers(page, 1, expected_numbers(shown, sample, (40, 24), 0, shown.stages[0] - 1, "CwBdtw"))


def test_receptive_field_throughput_and_files(page):
    page.click("#see_field0")
    page.wait_for_selector("#field0 img")
    page.click("#measure0")
    page.wait_for_function(
        "(document.querySelector('#speed0 textarea, #speed0 input') || {}).value.includes('images/s')"
    )
    names = page.locator("#files0").inner_text()
    assert all(f"attnmap{suffix}" in names.replace("\n", "") for suffix in (".png", ".svg", ".pdf", ".sh"))
    links = page.locator("#files0 a").evaluate_all("links => links.map(link => link.href)")
    script = page.request.get(next(link for link in links if link.endswith("/attnmap.sh"))).text()
    assert script == page.locator("#command0 .cm-content").inner_text().replace("\n", "") + "\n"


def test_opening_the_page_computes_nothing(browser, served, monkeypatch):
    """What it opens with was made before: nobody waits for it."""
    for name in ("attention", "answer", "picture"):
        monkeypatch.setattr(app_views, name, lambda *_: pytest.fail("something is computed"))
    page = browser.new_page()
    page.goto(served.address)
    for picture in ("picture", "maps0", "cam0"):
        page.wait_for_selector(f"#{picture} img")
    assert page.locator(".toast-body").count() == 0
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_it_fits_the_window(browser, served, width, scheme):
    """No part of the page is wider than the window, and text stands out from what is behind it."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    page.goto(served.address)
    page.locator("#cam0").scroll_into_view_if_needed()  # browsers load a picture when it is near
    page.wait_for_selector("#cam0 img")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = [page.evaluate(f"getComputedStyle({what}).{key}") for what, key in (
        ("document.querySelector('h1')", "color"), ("document.body", "backgroundColor"),
    )]  # fmt: skip
    text, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
    assert abs(text - ground) > 120 and (ground > 128) == (scheme == "light"), colours
    page.close()


def huge(path: Path) -> Path:
    """100 megapixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (10_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    pixels = zlib.compress(bytes(10_001) * 10_000, 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("kind", ["broken", "huge", "heavy"])
def test_what_is_refused_is_said_in_the_page(page, served, tmp_path, kind):
    """And what was shown before stays."""
    path = tmp_path / f"{kind}.png"
    if kind == "broken":
        path.write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    elif kind == "huge":
        huge(path)
    else:
        path.write_bytes(bytes(app_page.MOST_BYTES + 1))
    before = numbers(page, 0)
    page.set_input_files("#upload input[type=file]", path)
    toast = page.locator(".toast-body").first
    toast.wait_for()
    words = {"broken": "cannot be read as an image", "huge": "100000000 pixels", "heavy": "size"}[kind]
    assert words in toast.inner_text().replace(",", ""), toast.inner_text()
    assert numbers(page, 0) == before


def test_it_listens_on_this_machine_alone(served):
    assert app_command.parser().parse_args([]).host == "127.0.0.1"
    assert served.address.startswith("http://127.0.0.1:")
