"""What no Triton kernel here may do, read from its source: neither the interpreter nor a compiler would show it."""

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "kernels/ssm_ops").rglob("*triton*.py"))


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def named(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-3:]))
def test_grids_have_one_dimension(path):
    """The second and third end at 65535 programs, which a map of 2048 x 2048 pixels exceeds in tiles of 64."""
    axes = [call.args[0].value for call in calls(path) if named(call, "program_id")]
    assert set(axes) <= {0}
    launches = [call for call in calls(path) if isinstance(call.func, ast.Subscript)]
    assert not any(isinstance(call.func.slice, ast.Tuple) and len(call.func.slice.elts) > 1 for call in launches)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-3:]))
def test_no_scan_walks_backwards(path):
    """`associative_scan(reverse=True)` has given wrong results on GPUs where the order of a composition counts; the
    interpreter has a way of its own, so that its tests prove nothing of it."""
    scans = [call for call in calls(path) if named(call, "associative_scan")]
    assert not any(keyword.arg == "reverse" for call in scans for keyword in call.keywords)
    assert all(len(call.args) <= 3 for call in scans)


def test_there_are_kernels_to_read():
    found = [call for path in SOURCES for call in calls(path)]
    assert sum(named(call, "program_id") for call in found) > 10
    assert sum(named(call, "associative_scan") for call in found) == 1
