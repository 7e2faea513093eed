"""The tree of analyze/flops.py: parts against their closed forms, sums against the model's card."""

import csv

import pytest

from analyze.flops import main
from analyze.impl import flops
from ssm_models.model_card import model_card

MACS = ("macs", "macs_recurrence", "macs_official")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """The numbers go to runs/analyze below where the command is called."""
    monkeypatch.chdir(tmp_path)


def by_path(name, size, depth):
    return {module.path: module for module in flops.tree(name, (3, size, size), depth)}


def test_parts_of_a_vmamba_block():
    """VMamba, supplement: the terms of a v2 block; the stage has 8x8 tokens of 32 channels, 1 state, rank 2."""
    found = by_path("vmamba_nano", 32, 6)
    L, C, D, N, R = 64, 32, 32, 1, 2
    block = "layers.0.blocks.0"
    assert found[f"{block}.op.in_proj"].macs == L * C * D and found[f"{block}.op.out_proj"].macs == L * D * C
    assert found[f"{block}.op.conv2d"].macs == 9 * L * D and found[f"{block}.norm"].macs == 5 * L * C
    itself = found[f"{block}.op.(itself)"]
    products = 4 * L * D * (R + 2 * N) + 4 * L * D * R + 4 * L * D
    assert itself.macs == itself.macs_official == products + 4 * 9 * L * D * N
    assert itself.macs_recurrence == products + 4 * 7 * L * D * N // 2
    # x_proj_weight, dt_projs_weight and dt_projs_bias, A_logs, Ds
    assert itself.parameters == 4 * (D * (R + 2 * N) + D * R + D + D * N + D)
    assert found[f"{block}.mlp"].macs == 2 * L * C * 4 * C and found[f"{block}.mlp"].kind == "Mlp"
    assert found["classifier.head"].macs == 128 * 10 and found["classifier.head"].parameters == 128 * 10 + 10


def test_official_count_of_nc_ssd_differs_in_its_module_alone():
    found = by_path("vssd_nano", 32, 12)
    wrong = [path for path, module in found.items() if module.macs_official != module.macs]
    ends = [path for path in wrong if path and not any(other.startswith(f"{path}.") for other in wrong)]
    blocks = ("layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1")
    assert ends == [f"{block}.attn.(itself)" for block in blocks]


@pytest.mark.parametrize(
    "name, size, depth",
    [
        ("vmamba_nano", 40, 9),
        ("vim_nano", 32, 9),
        ("vssd_nano", 48, 9),
        ("vssd_nano_iccv2025", 48, 9),
        ("vssd_micro", 224, 3),
    ]
    + [("vmamba_tiny_s1l8", 224, 4)],
)
def test_sums(name, size, depth):
    """The root is the card, and published; the parts of every module that shows them add up to it."""
    modules, card = flops.tree(name, (3, size, size), depth), model_card(name, (3, size, size))
    root = modules[0]
    assert (root.path, root.depth, root.parameters) == ("", 0, card.parameters)
    assert [getattr(root, column) for column in MACS] == [getattr(card, column) for column in MACS]
    if card.macs_published:
        assert root.macs_official == pytest.approx(card.macs_published, rel=5e-7)
    assert max(module.depth for module in modules) <= depth
    paths = [module.path for module in modules]
    assert len(paths) == len(set(paths))
    shown = 0
    for module in modules:
        parts = [m for m in modules if m.path and m.path.rpartition(".")[0] == module.path and m is not module]
        if parts:
            shown += 1
            for column in ("parameters", *MACS):
                assert sum(getattr(part, column) for part in parts) == getattr(module, column), (module.path, column)
    assert shown > 3


def test_printed_tree_and_csv(tmp_path, capsys):
    path = tmp_path / "deep" / "tree.csv"
    assert main(["--models", "vim_nano", "vmamba_nano", "--tree", "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(str(path)) and flops.LEGEND in out
    lines = out.split("\nvmamba_nano\n")[1].splitlines()
    root = next(line.split() for line in lines if line.startswith("(model)"))
    card = model_card("vmamba_nano", (3, 32, 32))
    giga = [f"{getattr(card, column) / 1e9:.6f}" for column in MACS]
    assert root == ["(model)", "VSSM", "379,786", giga[0], "100.0%", *giga[1:]]
    assert any(line.split()[:3] == ["head", "Linear", "1,290"] and line.startswith("    head") for line in lines)
    rows = {(row["model"], row["module"]): row for row in csv.DictReader(path.open())}
    assert {model for model, _ in rows} == {"vim_nano", "vmamba_nano"}
    assert {int(row["depth"]) for row in rows.values()} == {0, 1, 2}
    assert rows["vmamba_nano", ""]["macs"] == str(card.macs)
    stage = rows["vmamba_nano", "layers.2"]
    assert (stage["type"], stage["depth"], stage["parameters"]) == ("Stage", "2", "177152")


@pytest.mark.parametrize("depth, lines", [("0", 1), ("1", 4)])
def test_depth(depth, lines, capsys):
    assert main(["--models", "vmamba_nano", "--tree", depth]) == 0
    assert len(capsys.readouterr().out.split("\nvmamba_nano\n")[1].split("\n\n")[0].splitlines()) == 2 + lines


def test_depth_must_be_possible(capsys):
    assert main(["--models", "vmamba_nano", "--tree", "-1"]) == 2
    assert capsys.readouterr().err == "error: --tree -1 must be at least 0\n"
