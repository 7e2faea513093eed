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


def base(pointer: ast.expr) -> str | None:
    """The name that a pointer's arithmetic starts from."""
    while isinstance(pointer, (ast.BinOp, ast.Subscript)):
        pointer = pointer.left if isinstance(pointer, ast.BinOp) else pointer.value
    return pointer.id if isinstance(pointer, ast.Name) else None


def read_back(function: ast.FunctionDef) -> set[str]:
    """The pointers that a kernel both writes through and reads through."""
    found = [node for node in ast.walk(function) if isinstance(node, ast.Call) and node.args]
    stored, loaded = ({base(call.args[0]) for call in found if named(call, name)} for name in ("store", "load"))
    return (stored & loaded) - {None}


def test_what_a_program_reads_back_lies_behind_a_barrier():
    """One thread of a program may read what another one has written; only a barrier puts the one after the other."""
    functions = [
        node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    ]
    reading = {function.name: read_back(function) for function in functions if read_back(function)}
    assert reading == {
        "route_scan_fwd_kernel": {"p_state"},
        "route_scan_bwd_kernel": {"p_carried", "p_dA", "p_dweight"},
        "add_to_map": {"sums"},  # called by these two, between their barriers
    }
    for function in functions:
        loops = [node for node in ast.walk(function) if isinstance(node, ast.For) and is_barrier(node.body[0])]
        assert len(loops) == (function.name in reading and function.name != "add_to_map")
        for loop in loops:  # nothing is read back before the loop that begins with a barrier
            inside = {id(node) for node in ast.walk(loop)}
            loads = [node for node in ast.walk(function) if isinstance(node, ast.Call) and named(node, "load")]
            assert all(id(c) in inside for c in loads if base(c.args[0]) in reading[function.name])


def is_barrier(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and named(statement.value, "debug_barrier")
    )


def test_there_are_kernels_to_read():
    found = [call for path in SOURCES for call in calls(path)]
    assert sum(named(call, "program_id") for call in found) > 10
    assert sum(named(call, "associative_scan") for call in found) == 1
