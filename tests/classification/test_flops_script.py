"""The table of analyze/flops.py."""

import csv

import pytest

from analyze.flops import main
from analyze.impl import flops
from ssm_models.model_card import model_card, registered_models


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """The numbers go to runs/analyze below where the command is called."""
    monkeypatch.chdir(tmp_path)


def test_table_and_csv_hold_the_counts(tmp_path, capsys):
    path = tmp_path / "deep" / "flops.csv"
    assert main(["--models", "vmamba_nano", "vmamba_tiny_s1l8", "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("vmamba")}
    nano = model_card("vmamba_nano", (3, 32, 32))  # the size that the model is made for
    macs = f"{nano.macs / 1e9:.6f}"
    assert lines["vmamba_nano"] == [
        "vmamba_nano",
        "32x32",
        "379,786",
        macs,
        f"{nano.macs_recurrence / 1e9:.6f}",
        macs,
        "-",
    ]
    assert lines["vmamba_tiny_s1l8"] == (
        ["vmamba_tiny_s1l8", "224x224", "30,249,064", "4.905610", "4.870838", "4.905610", "4.905610"]
    )
    assert flops.LEGEND in out and out.rstrip().endswith(str(path))
    rows = list(csv.DictReader(path.open()))
    assert [row["model"] for row in rows] == ["vmamba_nano", "vmamba_tiny_s1l8"]
    assert rows[0] | {"macs": int(rows[0]["macs"])} == {
        "model": "vmamba_nano", "height": "32", "width": "32", "parameters": "379786", "macs": nano.macs,
        "macs_recurrence": str(nano.macs_recurrence), "macs_official": str(nano.macs), "macs_published": "",
    }  # fmt: skip
    assert rows[1]["macs"] == rows[1]["macs_published"] == "4905609984"


@pytest.mark.parametrize("given, size", [(["64"], (64, 64)), (["64", "96"], (64, 96))])
def test_size(given, size, capsys):
    assert main(["--models", "vssd_nano", "--size", *given]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("vssd_nano"))
    assert row[1] == f"{size[0]}x{size[1]}" and row[3] == f"{model_card('vssd_nano', (3, *size)).macs / 1e9:.6f}"


def test_all_models_by_default(monkeypatch, capsys):
    one = model_card("vmamba_nano", (3, 32, 32))
    asked = []
    monkeypatch.setattr(flops, "model_card", lambda name, size: asked.append((name, size)) or one)
    assert main([]) == 0
    sizes = {name: (3, 32, 32) if "_nano" in name else (3, 224, 224) for name in registered_models()}
    assert dict(asked) == sizes and len(asked) == len(sizes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "vmamba_nano", "resnet50"], "error: --model resnet50: not among vanilla_vmamba_base, "),
        (["--size", "1", "2", "3"], "error: --size 1 2 3 is not H or H W"),
        (
            ["--models", "vim_nano", "--size", "0"],
            "error: vim_nano on 0x0 pixels: input_size=(3, 0,",
        ),
        (
            ["--models", "vim_nano", "--size", "8", "3"],
            "error: vim_nano on 8x3 pixels: an image of",
        ),
        (
            ["--models", "vanilla_vmamba_tiny", "--size", "3"],
            "error: vanilla_vmamba_tiny on 3x3 pixels: ",
        ),
    ],
)
def test_errors_name_the_value(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.out == ""
