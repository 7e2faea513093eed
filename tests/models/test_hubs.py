"""torch.hub: an entry point for every model of the zoo, by data alone, and what it says where nothing is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from ssm_models.model_card import registered_models

ROOT = Path(__file__).parents[2]


@pytest.fixture
def github(tmp_path, monkeypatch):
    """The repository as torch.hub keeps it after a download."""
    (tmp_path / "someone_vision-ssm_main").symlink_to(ROOT)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return "someone/vision-ssm:main"


def test_every_model_and_nothing_else_is_listed(github):
    assert sorted(torch.hub.list(github, trust_repo=True)) == sorted(registered_models())


def test_help_says_what_a_model_costs_and_which_weights_there_are(github):
    text = torch.hub.help(github, "vssd_tiny", trust_repo=True)
    assert text.startswith("vssd_tiny: 24.3 M parameters, 4.69 G multiply-accumulates.\n")
    assert "vssd_tiny.in1k (top-1 83.6, no licence), vssd_tiny.mesa_in1k" in text
    assert text.endswith("pretrained_cfg takes other weights: 'mesa_in1k'.")
    assert "there are none" in torch.hub.help(github, "vim_nano", trust_repo=True)


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_a_model_of_a_clone(name):
    torch.manual_seed(1)
    model = torch.hub.load(str(ROOT), name, source="local", pretrained=False, num_classes=3).eval()
    torch.manual_seed(1)
    expected = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x)) and model(x).shape == (1, 3)


def test_other_published_weights_and_unknown_arguments():
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), "vssd_tiny", source="local", pretrained_cfg="mesa_in1k")
    assert model.pretrained_cfg["url"].endswith("vssd_tiny_e300_with_mesa.pth")
    with pytest.raises(TypeError, match="num_clases"):
        torch.hub.load(str(ROOT), "vmamba_nano", source="local", num_clases=3)


def test_without_an_installation_the_command_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ssm_models" else find(name))
    with pytest.raises(RuntimeError) as caught:
        torch.hub.load(str(ROOT), "vmamba_nano", source="local")
    message = str(caught.value)
    assert message.startswith("vmamba_nano needs ssm_ops and ssm_models, which are not installed: pip install ")
    assert message.endswith(f"pip install --no-build-isolation {ROOT}") and "\n" not in message


def test_the_list_imports_nothing_heavy():
    code = "import runpy, sys; runpy.run_path('hubconf.py'); print({'torch', 'timm', 'ssm_models'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
