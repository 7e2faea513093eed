"""`python -m ssm_models`."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import timm

from ssm_models import __main__ as command
from ssm_models import model_card
from ssm_models.model_card import registered_models
from ssm_models.weights import fetch

COSTS = json.loads(files("ssm_models.weights").joinpath("zoo.json").read_text())


def test_costs_of_the_zoo():
    assert set(COSTS) == set(registered_models())
    for name in COSTS:
        model = timm.create_model(name, device="meta")
        assert COSTS[name]["parameters"] == sum(parameter.numel() for parameter in model.parameters()), name


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano", "vssd_tiny_iccv2025", "vmamba_tiny_s1l8"])
def test_costs_are_those_of_the_model_card(name):
    card = model_card(name)
    assert COSTS[name] == {"parameters": card.parameters, "macs": card.macs}


def test_list(server, capsys):
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    [row] = [line for line in lines if line.startswith("vmamba_tiny_s1l8 ")]
    assert row.split()[1:] == ["30,249,064", "4.91", "in1k", "(82.6,", "MIT)"]
    [row] = [line for line in lines if line.startswith("vssd_tiny ")]
    assert row.endswith("in1k (83.6, no licence stated), mesa_in1k (84.1, no licence stated)")
    [row] = [line for line in lines if line.startswith("vmamba_tiny_m2 ")]
    assert row.endswith(" none")
    [row] = [line for line in lines if line.startswith("upernet_vmamba-tiny-s1l8_160k_ade20k-512x512 ")]
    assert row.endswith("47.9 / 48.8")


def test_json(publish, server, capsys):
    path = fetch(publish("vmamba_nano"))
    assert command.main(["--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    rows = {row["model"]: row for row in listed["models"]}
    assert rows["vmamba_nano"]["weights"][0]["cached"] == str(path)
    assert rows["vim_tiny_patch16_224"]["weights"][0]["bytes"] == 115013118
    assert rows["vim_tiny_patch16_224"]["weights"][0]["cached"] is None
    assert len(listed["detectors_and_segmentors"]) == 29


def test_download_and_verify(publish, server, capsys):
    entry = publish("vim_nano")
    assert command.main(["--download", "vim_nano"]) == 0
    assert capsys.readouterr().out == f"vim_nano.test: {fetch(entry)}\n"
    assert command.main(["--verify"]) == 0
    out = capsys.readouterr().out
    assert "is whole; no sha256 is published" in out and "\n1 of " in out
    fetch(entry).write_bytes(b"damaged")
    assert command.main(["--verify"]) == 2
    assert capsys.readouterr().err.startswith("error: vim_nano.pth is no whole file of weights")


def test_mistakes(server, capsys):
    assert command.main(["--download", "vssd_tinny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: vssd_tinny is neither a file") and len(error.splitlines()) == 1


def test_the_document_has_the_table():
    """docs/weights.md ends with what `python -m ssm_models --markdown` prints."""
    text = (Path(__file__).parents[3] / "docs/weights.md").read_text()
    assert text.endswith(f"\n\n{command.markdown()}\n")
