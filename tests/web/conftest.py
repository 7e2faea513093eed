"""A headless browser: Debian's Chromium, driven by Playwright. `bash run_tests.sh --web` installs both."""

import shutil

import pytest

FLAGS = (
    "--no-sandbox",  # for root, as in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def pytest_collection_modifyitems(config, items):
    """They run where they are asked for, `-m web`, and neither by default nor with --all."""
    if "web" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("web"):
            item.add_marker(pytest.mark.skip(reason="runs with -m web"))


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-web.txt")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()
