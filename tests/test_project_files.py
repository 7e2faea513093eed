"""CONTRIBUTING, CHANGELOG and CITATION say what is there."""

import re
from pathlib import Path

import yaml

import ssm_ops

ROOT = Path(__file__).parents[1]


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:tests|kernels|classification|configs|docs)/[\w./-]+)`", text))
    named |= set(re.findall(r"bash (\S+\.sh)", text)) | set(re.findall(r"> (docs/\S+\.md)", text))
    assert len(named) > 12
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    beside = {
        "classification/ssm_models": ("vssm.py", "vim.py", "vssd.py", "layers/timm_model.py", "weights/table.json")
    }
    beside["kernels/ssm_ops"] = ("_self_check.py", "_flops.py")
    for folder, names in beside.items():
        assert all(name in text and (ROOT / folder / name).is_file() for name in names)
    script = (ROOT / "run_tests.sh").read_text()
    assert all(flag in script for flag in re.findall(r"run_tests\.sh (--\w+)", text))


def test_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == ssm_ops.__version__ and cited["license"] == "Apache-2.0"
    sources = [reference["url"] for reference in cited["references"]]
    models = "".join(path.read_text() for path in (ROOT / "classification" / "ssm_models").rglob("*.py"))
    assert len(sources) == 3 and all(url in models for url in sources)


def test_changelog_names_every_operator():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)[0] == "Unreleased"
    operators = {name for name in ssm_ops.__all__ if (ROOT / "kernels/ssm_ops" / name).is_dir()}
    assert len(operators) == 9 and all(f"`{name}`" in text for name in operators)
