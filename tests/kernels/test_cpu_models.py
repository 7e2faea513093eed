"""The table of whole models on a CPU: how it is made, and that kernels/README.md prints it."""

import csv
import importlib
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from ssm_models.layers import onednn

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
TABLE = FOLDER / "results" / "cpu-2-cores-amx" / "cpu-models.csv"
DTYPES = ("float32", "bfloat16")
CELLS = [(way, batch) for way in ("eager", "prepared", "int8") for batch in (1, 8)] + [("compiled", 1), ("training", 8)]


def rows_of(table: Path) -> list[dict[str, str]]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    names = ("cpu_models", "models", "timing", "output", "roofline")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("cpu_models")
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("lacks", [False, True], ids=["bfloat16", "none"])
def test_every_cell_compares_its_models_in_the_same_turns(script, lacks, tmp_path, monkeypatch, capsys):
    options = ["--models", "vmamba_nano", "vim_nano", "--size", "32", "--turns", "1", "--ways"]
    options += ["prepared", "int8", "training"]
    measured, times = [], importlib.import_module("timing").Times

    def measure(runs, turns, device):
        for run in runs.values():
            run()
        measured.append(list(runs))
        return {name: times(*(3 * (0.5 + i,))) for i, name in enumerate(runs)}

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "problem", lambda dtype: "no units" if lacks and dtype == torch.bfloat16 else None)
    if not lacks and onednn.problem(torch.bfloat16) is not None:
        pytest.skip("this processor has no bfloat16")
    script.main([*options, "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "cpu-models.csv")
    cells = 6 if lacks else 8  # prepared in two batches, training in one, two precisions; int8 in two batches
    assert measured == [["vmamba_nano", "vim_nano"]] * cells
    assert [row["ratio"] for row in rows] == ["1.000", "0.333"] * cells
    assert capsys.readouterr().out.count("left out: no units") == 8 - cells
    assert {row["baseline"] for row in rows} == {"vmamba_nano"} and {row["cpu"] for row in rows} == {script.cpu_name()}
    assert (tmp_path / "cpu-models.png").read_bytes().startswith(b"\x89PNG")


def test_the_profile_adds_up_to_all_of_the_time(script, capsys):
    script.main(["--profile", "vim_nano", "--size", "32", "--ways", "eager"])
    tables = capsys.readouterr().out.split("vim_nano, eager, ")[1:]
    for table, dtype in zip(tables, ("float32", "bfloat16"), strict=True):
        assert table.startswith(f"{dtype}, batch 8")
        parts = {line[:38].strip(): float(line[38:-2]) for line in table.splitlines()[1:]}
        assert sum(parts.values()) == pytest.approx(100, abs=0.5)
        assert parts["scans"] > 1 and parts["products and convolutions"] > 1 and parts["gate"] > 0


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("mkldnn::_linear_pointwise", "products and convolutions"),
        ("aten::native_layer_norm_backward", "norms"),
        ("ssm_ops::ss2d_scan_fwd", "scans"),
        ("aten::gelu_backward", "activations"),
        ("aten::copy_", "copies"),
        ("aten::add_", "additions and products by element"),
        ("aten::view", "the rest"),
    ],
)
def test_kinds_of_operators(script, operator, kind):
    assert script.kind_of(operator) == kind


def test_readme_prints_the_committed_table():
    """Per model and cell "float32 / bfloat16" (compiled: float32), rounded to two places, and the processor's name."""
    readme = (FOLDER.parent / "README.md").read_text()
    rows = rows_of(TABLE)
    found = {(row["model"], row["way"], int(row["batch"]), row["dtype"]): float(row["ratio"]) for row in rows}
    assert len({row["cpu"] for row in rows}) == 1 and rows[0]["cpu"] in readme
    for model in dict.fromkeys(row["model"] for row in rows):
        printed = re.search(rf"^\|(?: timm)? `{model}` \| (.*) \|$", readme, flags=re.MULTILINE)
        cells = [cell.strip() for cell in printed[1].split("|")]
        wanted = [
            " / ".join(f"{found[cell]:.2f}" for dtype in DTYPES if (cell := (model, way, batch, dtype)) in found)
            for way, batch in CELLS
        ]
        assert cells == wanted, model


def test_a_wrong_model_is_named(script, tmp_path):
    with pytest.raises(SystemExit, match="vmamba_nan is not in timm's registry"):
        script.main(["--models", "vmamba_nan", "--turns", "1", "--out", str(tmp_path)])
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["vim_nano", "vmamba_nano", "vssd_nano"])
def test_floors_count_every_product_of_a_model(script, name, monkeypatch):
    """With a millisecond for each product, and a second for the model and the copy, the floors are counts."""
    roofline, times = importlib.import_module("roofline"), importlib.import_module("timing").Times

    def measure(runs, turns, device):
        for run in runs.values():
            run()
        return {key: times(*(3 * (1e-3 if type(key) is tuple else 1.0,))) for key in runs}

    monkeypatch.setattr(roofline, "measure", measure)
    monkeypatch.setattr(roofline, "COPIED", 1 << 20)
    row = roofline.floors(name, 2, torch.float32, 1)

    model, moved = roofline.create(name, 224, torch.device("cpu")).eval(), {torch.nn.Linear: [], torch.nn.Conv2d: []}
    for module, (kind, numbers) in itertools.product(model.modules(), moved.items()):
        if isinstance(module, kind):
            module.register_forward_hook(lambda _, x, y, numbers=numbers: numbers.append(x[0].numel() + y.numel()))
    model(torch.randn(2, 3, 224, 224))
    linear, convolutions = moved.values()
    assert (float(row["linear_ms"]), float(row["convolution_ms"])) == (len(linear), len(convolutions))
    assert float(row["share_of_products"]) == pytest.approx((len(linear) + len(convolutions)) / 1000, abs=6e-4)
    numbers = sum(linear) + sum(convolutions) + sum(p.numel() for p in model.parameters())
    assert float(row["bytes_ms"]) == pytest.approx(1e3 * 4 * numbers / (2 << 20), rel=1e-6)


def test_readme_prints_the_floors():
    """Shares of linear maps and convolutions, rounded to whole percents."""
    readme, rows = (FOLDER.parent / "README.md").read_text(), rows_of(TABLE.with_name("roofline.csv"))
    most = max(float(row["bytes_ms"]) / float(row["model_ms"]) for row in rows)
    assert f"bytes would take {100 * most:.0f} %" in " ".join(readme.split())
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]  # float32, then bfloat16, one image, then eight
        linear, convolutions = (
            [100 * float(row[f"{kind}_ms"]) / float(row["model_ms"]) for row in mine]
            for kind in ("linear", "convolution")
        )
        cells = " | ".join(f"{a:.0f} + {b:.0f} %" for a, b in zip(linear, convolutions, strict=True))
        assert f"`{model}` | {cells} |" in readme, model


def test_readme_prints_the_ratios_without_avx512():
    readme = (FOLDER.parent / "README.md").read_text()
    rows = rows_of(TABLE.parents[1] / "cpu-2-cores-avx2/cpu-models.csv")
    found = {(row["model"], row["batch"]): f"{float(row['ratio']):.2f}" for row in rows if row["way"] == "prepared"}
    said = re.search(r"with AVX2 alone \(`results/cpu-2-cores-avx2/`\), the same ratios.*?\n\n", readme, re.DOTALL)[0]
    models = ("vmamba_tiny_s1l8", "vssd_tiny", "vim_tiny_patch16_224", "convnext_tiny")
    assert re.findall(r"0\.\d\d|1\.\d\d", said) == [found[model, batch] for model in models for batch in ("1", "8")]
