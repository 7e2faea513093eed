"""What this installation was built with, for the doctor: setup.py keeps it beside the libraries in _built.json.

pip hides what a build prints, and takes a wheel that it built before of the same sdist whatever SSM_OPS_BUILD says now.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

VARIABLE = "SSM_OPS_BUILD"
LIBRARIES = ("cpu", "cuda", "onnxruntime")
_FOLDER = Path(__file__).parent
_RECORD = _FOLDER / "_built.json"


def build_command(folder: Path = _FOLDER) -> str:
    """What builds the libraries of a package in `folder` (anew): in its checkout, or for an installed copy."""
    if folder.parent.name in ("site-packages", "dist-packages"):
        return "pip install --no-cache-dir --force-reinstall --no-deps SDIST_OR_CHECKOUT"
    return "pip install -e . --no-build-isolation"


def describe(record: Path = _RECORD) -> list[str]:
    """Lines on the libraries that are there and, by `record`, on what was asked for and why others were left out."""
    there = ", ".join(n for n in LIBRARIES if importlib.util.find_spec(f"{__package__}._{n}") is not None) or "none"
    if not record.is_file():
        return [f"compiled libraries: {there}"]
    written = json.loads(record.read_text(encoding="utf-8"))
    lines = [f"compiled libraries: {there} (built with {VARIABLE}={written['asked']})"]
    lines += [f"  left out: {name}: {reason}" for name, reason in written["left_out"].items()]
    wanted = os.environ.get(VARIABLE)
    if wanted not in (None, written["asked"]):
        lines.append(f"  {VARIABLE}={wanted} is set, but was not when this was built: {build_command()}")
    return lines
