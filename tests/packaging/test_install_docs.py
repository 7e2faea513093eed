"""docs/install.md and docs/versions.md say what the packages and the scripts do."""

import os
import re
import sys
from pathlib import Path

import pytest

import ssm_ops

ROOT = Path(__file__).parents[2]
INSTALL, VERSIONS = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("install", "versions"))
SETUP = (ROOT / "setup.py").read_text()


def first_cells(page: str, header: str) -> list[str]:
    """Of the table that begins with `header`: the code in the first cell of every row."""
    rows = page.partition(f"| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib") if sys.version_info < (3, 11) else __import__("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_pythons(project):
    first, last = re.search(r"^Python (3\.\d+) to (3\.\d+)\.", INSTALL, flags=re.MULTILINE).groups()
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if line.startswith("Programming Language")]
    assert [named[0], named[-1]] == [first, last] and project["requires-python"] == f">={first}"


def test_extras(project):
    assert sorted(first_cells(INSTALL, "extra")) == sorted(set(project["optional-dependencies"]) - {"test"})


def test_what_can_be_built():
    builds = re.search(r"^BUILDS = \((.*)\)$", SETUP, flags=re.MULTILINE)[1]
    assert sorted(first_cells(INSTALL, "`SSM_OPS_BUILD=`")) == sorted(re.findall(r"\w+", builds))


def test_commands_and_files_that_are_named():
    assert f"vision_ssm-{ssm_ops.__version__}.tar.gz" in INSTALL
    for name in set(re.findall(r"`((?:tests|\.ci)/[\w./]+)", INSTALL + VERSIONS)):
        assert (ROOT / name).is_file(), name
    assert all(os.access(ROOT / ".ci" / name, os.X_OK) for name in ("matrix", "manylinux"))
    used = set(re.findall(r"\.ci/matrix.* --(\w+)", VERSIONS))
    assert used and all(f'"--{option}"' in (ROOT / ".ci/matrix").read_text() for option in used)
