"""The documentation's site: built without a warning, and looked at in a browser."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = ("", "install/", "tour/", "gallery/", "weights/", "api/ssm_ops/")

pytestmark = pytest.mark.web


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """--strict: a link or a reference that leads nowhere, or a page that no menu has, ends the build."""
    pytest.importorskip("mkdocs", reason="pip install -r requirements-web.txt")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()


def test_every_page_of_the_menu_is_there(site):
    def leaves(nav):
        for entry in nav:
            for value in entry.values():
                yield from leaves(value) if isinstance(value, list) else [value]

    pages = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(pages) > 20
    for page in pages:
        path = site / re.sub(r"(index|README)?\.md$", "", page).rstrip("/") / "index.html"
        assert path.is_file(), path


def test_the_reference_is_made_of_docstrings(site):
    import ssm_models
    import ssm_ops

    for package, names in ((ssm_ops, ssm_ops.__all__), (ssm_models, ("VSSM", "VisionMamba", "VSSD", "DenseBackbone"))):
        text = (site / "api" / package.__name__ / "index.html").read_text()
        documented = set(re.findall(rf'id="{package.__name__}\.(?:\w+\.)*(\w+)"', text))
        assert set(names) <= documented, set(names) - documented
    assert "reset_classifier" in (site / "api/ssm_models/index.html").read_text()
    assert 'id="ssm_train.trainer.Trainer"' in (site / "api/ssm_train/index.html").read_text()
    assert 'id="ssm_mm.backbone.SSMBackbone"' in (site / "api/ssm_mm/index.html").read_text()


@pytest.mark.parametrize("scheme, background", [("light", (255, 255, 255)), ("dark", (30, 33, 41))])
@pytest.mark.parametrize("width", [390, 1300])
def test_pages_in_a_browser(browser, address, scheme, background, width):
    """Nothing fails to load, nothing comes from elsewhere, nothing is wider than the window, and colours follow."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
    for name in PAGES:
        page.goto(address + name, wait_until="load")
        assert page.locator("h1").first.inner_text().strip()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        widths = page.eval_on_selector_all("article img", "images => images.map(image => image.naturalWidth)")
        assert all(widths), name
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        found = tuple(map(int, re.findall(r"\d+", colour)[:3]))
        assert all(abs(a - b) < 12 for a, b in zip(found, background, strict=True)), (name, colour)
    page.close()
    assert failed == [] and all(url.startswith(address) for url in asked)
