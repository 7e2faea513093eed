"""The README's promises that are not another test's: its length, links, tables, and its code."""

import csv
import re
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [Path("README.md"), *sorted(p.relative_to(ROOT) for p in (ROOT / "docs").glob("*.md"))]


def rows(page: str) -> dict[str, list[str]]:
    found = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in found}


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_pictures_are_there(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = [t for t in targets if not re.match(r"https?:|#|mailto:", t)]
    missing = [t for t in missing if not (ROOT / page).parent.joinpath(t.split("#")[0]).exists()]
    assert not missing


def test_proofs_and_pages_that_are_named_are_there():
    named = re.findall(r"`((?:tests|docs|kernels|analyze|configs)/[\w./-]+)`", README)
    assert len(named) >= 8 and all((ROOT / path).exists() for path in named)


def test_the_table_of_results_is_that_of_all_models_and_of_the_measurement():
    models = {name: cells for name, cells in rows("docs/models.md").items() if len(cells) == 4}
    table = ROOT / "kernels/benchmarks/results/cpu-2-cores-amx/readme/cpu-models.csv"
    with open(table, newline="") as file:
        measured = {row["model"]: row for row in csv.DictReader(file)}
    found = {name: cells for name, cells in rows("README.md").items() if len(cells) == 5}
    [cpu] = {row["cpu"] for row in measured.values()}
    assert len(found) == 10 and cpu in README
    for name, (top1, parameters, macs, ratio, _) in found.items():
        assert [f"{int(models[name][0].replace(',', '')) / 1e6:.1f} M", *models[name][1:3]] == [parameters, macs, top1]
        row = measured[name]
        assert (row["way"], row["dtype"], row["batch"]) == ("prepared", "float32", "1")
        assert ratio == f"{float(row['ratio']):.2f}"


def test_weights_of_the_table_have_published_names():
    from ssm_models.weights import entries

    for name, cells in rows("README.md").items():
        if len(cells) == 5:
            tags = {entry.removeprefix(name + ".") for entry in entries() if entry.startswith(name + ".")}
            assert set(re.findall(r"`\.(\w+)`", cells[4])) == {tag for tag in tags if tag.endswith("in1k")}


def test_the_five_lines_run(capsys, monkeypatch):
    code = re.search(r"## Five lines of Python\n\n```python\n(.*?)```", README, flags=re.DOTALL)[1]
    create = timm.create_model
    asked = []

    def without_download(name, pretrained):
        asked.append((name, pretrained))
        return create(name)

    monkeypatch.setattr(timm, "create_model", without_download)
    exec(compile(code, "README", "exec"), {})
    assert asked == [("vmamba_tiny_s1l8.in1k", True)] and "indices" in capsys.readouterr().out


def test_the_line_of_the_quickstart_is_the_one_it_prints():
    line = re.search(r"`(top-1 .* s)`", README)[1]
    printed = re.search(r'print\(f"(top-1 .*?)"\)', (ROOT / "quickstart.sh").read_text())[1]
    assert re.fullmatch(re.sub(r"\\\{.*?\\\}", r"[\\d.]+", re.escape(printed)), line)
