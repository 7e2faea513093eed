"""`bash modelcard.sh NAME`: download, evaluate, and the published beside the measured number."""

import subprocess

import pytest

from analyze.impl import modelcard
from analyze.modelcard import main
from ssm_train import cli
from ssm_train.data.digits import write_digits


@pytest.fixture
def card(monkeypatch, tmp_path, capsys):
    """card(*arguments) -> (status, what it printed); the command runs in this process, whose table has the server."""

    start = subprocess.run

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        if command[1:3] != ["-m", "torch.distributed.run"]:
            return start(command, **options)
        assert command[5] == "classification/main.py"
        return subprocess.CompletedProcess(command, cli.main(command[6:]))

    monkeypatch.setattr(modelcard, "OUTPUT", tmp_path / "output")
    monkeypatch.setattr(subprocess, "run", run)
    write_digits(tmp_path / "digits")

    def call(*arguments: str) -> tuple[int, str]:
        status = main([*arguments, "--data-path", str(tmp_path / "digits"), "--device", "cpu"])
        said = capsys.readouterr()
        assert "error" not in said.err, said.err
        return status, said.out

    return call


def test_published_and_measured(publish, card):
    """Random weights know as much as chance: 10 percent, of 360 images."""
    publish("vssd_nano", entry="ema", metrics={"top1": 10.0}, recipe="vssd_nano_digits")
    status, out = card("vssd_nano.test", "--tolerance", "9.9")
    assert status == 0, out
    metric, published, measured, difference = out.splitlines()[-1].split()
    assert (metric, published) == ("top-1", "10.00")
    assert float(difference) == pytest.approx(float(measured) - 10, abs=0.011)
    publish("vssd_nano", entry="ema", metrics={"top1": 95.0}, recipe="vssd_nano_digits")
    status, out = card("vssd_nano_digits")
    assert status == 1 and out.splitlines()[-1].endswith("beyond the tolerance of 0.2")
