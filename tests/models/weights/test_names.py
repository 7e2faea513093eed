"""Names of published weights in place of paths, in every part of the repository that takes weights."""

from pathlib import Path

import pytest
import timm
import torch

from analyze import inputs
from ssm_mm import checkpoints
from ssm_train.common.errors import UserError
from ssm_train.step.model import Pretrained, load_pretrained

NAME = Path("vssd_nano.test")


def test_the_trainer(publish, contents):
    """`main.py --pretrained NAME` takes the set of weights that the table names."""
    publish("vssd_nano", entry="ema")
    model = timm.create_model("vssd_nano")
    load_pretrained(model, Pretrained(NAME))
    expected = contents["vssd_nano"]["model_ema"]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="vssd_nanno.test is neither a file nor the name of published weights"):
        load_pretrained(model, Pretrained(Path("vssd_nanno.test")))


def test_the_analyses(publish, contents):
    """`--checkpoint NAME`, with which a model need not be named."""
    publish("vssd_nano", entry="ema")
    assert inputs.model_name(None, NAME) == "vssd_nano"
    expected = contents["vssd_nano"]["model_ema"]
    found = inputs.load_model("vssd_nano", NAME).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_detectors_and_segmentors(publish, contents):
    """What the tools read as a checkpoint."""
    publish("vmamba_nano")
    name = "patch_embed.0.weight"
    assert torch.equal(checkpoints.read("vmamba_nano.test")["model"][name], contents["vmamba_nano"]["model"][name])
