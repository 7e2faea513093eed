"""Which part of the repository may import which: read from the source, not from good intentions."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"ssm_ops", "ssm_models", "ssm_train", "ssm_mm", "detection", "segmentation", "analyze", "tests"}
OPEN_MMLAB = {"mmengine", "mmcv", "mmdet", "mmseg"}
FAMILIES = {"vssm", "vim", "vssd"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute dotted name, at module level?) of everything that a file imports."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    package = list(module_of(path).split("."))
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join(base)] if node.module else [".".join([*base, alias.name]) for alias in node.names]
            found += [(name, id(node) in top) for name in names]
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    # source folders, not packages
    parts = parts[1:] if parts[0] in ("kernels", "classification") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def violations(paths, allowed) -> list[str]:
    return [f"{p.relative_to(ROOT)}: {name}" for p in paths for name, top in imports(p) if not allowed(name, top, p)]


def root_of(name: str) -> str:
    return name.split(".")[0]


def test_this_test_sees_the_sources():
    assert ("torch", True) in imports(ROOT / "kernels/ssm_ops/selective_scan/api.py")
    assert ("ssm_ops.selective_scan.api", True) in imports(ROOT / "kernels/ssm_ops/selective_scan/impl/cpu.py")
    assert ("ssm_models.layers.ss2d", True) in imports(ROOT / "classification/ssm_models/vssm.py")


def test_ssm_ops_needs_torch_alone():
    def allowed(name, top, path):
        root = root_of(name)
        triton = root == "triton" and (path.stem.strip("_").split("_")[0] == "triton" or not top)
        return root in sys.stdlib_module_names or root in ("torch", "ssm_ops") or triton

    assert violations(files("kernels/ssm_ops"), allowed) == []


def test_implementations_never_import_each_other():
    names = {"reference", "cpu", "triton", "cuda"}

    def allowed(name, top, path):
        return not (name.startswith("ssm_ops.") and ".impl." in name and name.rsplit(".", 1)[-1] in names)

    implementations = [path for path in files("kernels/ssm_ops") if path.parent.name == "impl"]
    assert len(implementations) > 15 and violations(implementations, allowed) == []


COMPOSITIONS = {
    "ss2d_scan/impl/reference.py": {"cross_scan", "selective_scan"},
    "bidirectional_scan/impl/reference.py": {"selective_scan"},
}
"""Operators that are made of others, which are called as any user calls them."""


def test_operators_know_their_siblings_only_to_be_made_of_them():
    """What several operators share stands in modules of the package, not in one of them."""
    root = ROOT / "kernels/ssm_ops"
    operators = {path.parent.name for path in root.glob("*/api.py")}
    found = {}
    for path in files("kernels/ssm_ops"):
        own, *rest = path.relative_to(root).parts
        for name, _ in imports(path):
            sibling, _, inside = name.removeprefix("ssm_ops.").partition(".")
            if rest and sibling in operators - {own}:
                assert not inside, f"{path}: {name} reaches into an operator"
                found.setdefault(f"{own}/{'/'.join(rest)}", set()).add(sibling)
    assert len(operators) == 10 and found == COMPOSITIONS


def test_from_a_logit_to_a_launch_are_four_files_and_two_for_all_operators():
    """Model, layer, operator, implementation; between the last two the machinery that carries every call."""
    way = [
        ("classification/ssm_models/vssm.py", "ssm_models.layers.ss2d"),
        ("classification/ssm_models/layers/ss2d.py", "ssm_ops"),
        ("kernels/ssm_ops/ss2d_scan/api.py", "ssm_ops._autograd"),
        ("kernels/ssm_ops/_autograd.py", "ssm_ops._library"),
    ]
    for path, following in way:
        assert following in {name for name, _ in imports(ROOT / path)}, path
    for launcher in ("selective_scan/impl/cuda.py", "ss2d_scan/impl/triton.py", "selective_scan/impl/triton.py"):
        source = (ROOT / "kernels/ssm_ops" / launcher).read_text()
        assert "_kernel[" in source or "_launch(" in source, launcher
    assert sorted(path.name for path in (ROOT / "kernels/ssm_ops/ss2d_scan").glob("*.py")) == ["__init__.py", "api.py"]


def test_models_know_no_scripts_and_no_configs():
    banned = (OURS - {"ssm_ops", "ssm_models"}) | OPEN_MMLAB | {"yacs", "argparse"}

    def allowed(name, top, path):
        return root_of(name) not in banned or (name == "argparse" and path.name == "__main__.py")

    assert violations(files("classification/ssm_models"), allowed) == []


def test_layers_know_no_family_and_families_do_not_know_each_other():
    layers = files("classification/ssm_models/layers")
    ok = lambda name, *_: not name.startswith("ssm_models") or name.startswith("ssm_models.layers")  # noqa: E731
    assert violations(layers, ok) == []
    families = [ROOT / "classification/ssm_models" / f"{name}.py" for name in sorted(FAMILIES)]
    ok_family = lambda name, *_: ok(name) or name == "ssm_models.pretrained"  # noqa: E731
    assert violations(families, ok_family) == []
    assert (
        violations([ROOT / "classification/ssm_models/pretrained.py"], lambda n, *_: n.split(".")[-1] not in FAMILIES)
        == []
    )


def test_what_detection_and_segmentation_share_knows_neither():
    banned = (OURS - {"ssm_models", "ssm_train", "ssm_mm"}) | {"mmdet", "mmseg"}
    common = "ssm_train.common"
    shared = files("classification/ssm_mm")
    ok = lambda name, *_: root_of(name) not in banned and (root_of(name) != "ssm_train" or name.startswith(common))  # noqa: E731
    assert len(shared) > 5 and violations(shared, ok) == []


@pytest.mark.parametrize(("task", "framework"), [("detection", "mmseg"), ("segmentation", "mmdet")])
def test_a_task_needs_its_own_framework_alone(task, framework):
    assert violations(files(task), lambda name, *_: root_of(name) != framework) == []


def test_rooms_of_the_trainer():
    """What a room of the trainer may know of the others; cli, start and trainer see all."""
    may = {
        "common": {"common"},
        "config": {"config", "common"},
        "data": {"data", "config", "common"},
        "record": {"record", "config", "step", "common"},
        "step": {"step", "data", "config", "record", "common"},
    }
    for room, legal in may.items():
        rooms = files(f"classification/ssm_train/{room}")

        def ok(name, top, path, legal=legal):
            return not name.startswith("ssm_train") or name.split(".")[1] in legal

        assert len(rooms) > 2 and violations(rooms, ok) == []


def test_tasks_do_not_know_each_other_and_nobody_knows_analyze_or_tests():
    may = {
        "classification/ssm_train": {"ssm_models", "ssm_ops", "ssm_train"},
        "detection": {"ssm_models", "ssm_train", "ssm_mm", "detection"},
        "segmentation": {"ssm_models", "ssm_train", "ssm_mm", "segmentation"},
        "analyze": OURS - {"tests"},
        "kernels": {"ssm_ops", "ssm_models"},
    }
    for folder, legal in may.items():
        banned = OURS - legal
        assert files(folder) and violations(files(folder), lambda name, *_, b=banned: root_of(name) not in b) == []


def test_the_models_have_one_import_name():
    name = "classification." + "ssm_models"
    assert violations(files("classification", "analyze", "tests"), lambda n, *_: not n.startswith(name)) == []


@pytest.mark.parametrize(
    "banned", ["sys.path" + ".", "torch.load(" + "open", "weights_only=" + "False", "except" + ":"]
)
def test_banned_phrases(banned):
    sources = files("kernels", "classification", "detection", "segmentation", "analyze", "tests")
    assert [str(p.relative_to(ROOT)) for p in sources if banned in p.read_text()] == []


def test_no_file_is_too_long():
    sources = files("kernels", "classification", "detection", "segmentation", "analyze", "tests")
    assert [f"{p.relative_to(ROOT)}" for p in sources if len(p.read_text().splitlines()) > 800] == []
