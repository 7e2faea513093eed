"""ssm_mm.checkpoints: which weights are taken from a file, as mmengine itself writes it."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from mmengine.hooks import EMAHook  # noqa: E402

from ssm_mm.checkpoints import Options, dataset_meta, load_strictly  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402


class Segmentor(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 1)
        self.decode_head = nn.BatchNorm2d(4)


@pytest.fixture
def saved(tmp_path):
    """(file, its plain weights, its averaged weights), written by the hook that averages."""
    model, hook = Segmentor(), EMAHook(momentum=0.5)
    runner = SimpleNamespace(model=model, iter=3, epoch=1)
    hook.before_run(runner)
    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        hook.after_train_iter(runner, step)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = {name: value.clone() for name, value in hook.ema_model.module.state_dict().items()}
    content = {"state_dict": {name: value.clone() for name, value in plain.items()}, "meta": {}}
    hook.before_save_checkpoint(runner, content)
    torch.save(content, tmp_path / "iter_4.pth")
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)
    return tmp_path / "iter_4.pth", plain, averaged


@pytest.mark.parametrize(("which", "words"), [("auto", "averaged"), ("ema", "averaged"), ("model", "plain")])
def test_sets(saved, which, words, capsys):
    file, plain, averaged = saved
    model = Segmentor()
    load_strictly(model, file, Options(which))
    expected = plain if words == "plain" else averaged
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert capsys.readouterr().out == f"checkpoint {file} holds plain and averaged weights, taken: {words}\n"


def test_a_file_without_averages(tmp_path, capsys):
    torch.save({"state_dict": Segmentor().state_dict()}, tmp_path / "a.pth")
    load_strictly(Segmentor(), tmp_path / "a.pth", Options("model"))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="a.pth has no averaged weights: use --which model"):
        load_strictly(Segmentor(), tmp_path / "a.pth", Options("ema"))


def test_values_that_are_not_finite(tmp_path):
    weights = Segmentor().state_dict()
    weights["decode_head.bias"][1] = math.nan
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match="decode_head.bias has 1 values that are not finite"):
        load_strictly(Segmentor(), tmp_path / "a.pth", Options())
    model = Segmentor()
    load_strictly(model, tmp_path / "a.pth", Options(allow_nonfinite=True))
    assert model.decode_head.bias[1].isnan()


def test_names_and_colours_of_classes(tmp_path):
    for meta, expected in (
        (
            {"classes": ("a", "b"), "palette": [[1, 2, 3], (4, 5, 6)]},
            {"classes": ("a", "b"), "palette": [(1, 2, 3), (4, 5, 6)]},
        ),
        ({"classes": ["a", 3], "palette": [[1, 2, 256]]}, {}),
        ({"classes": "ab", "palette": [1]}, {}),
        ([1], {}),
        (None, {}),
    ):
        torch.save({"state_dict": {}, "meta": {"dataset_meta": meta}}, tmp_path / "a.pth")
        assert dataset_meta(tmp_path / "a.pth") == expected
    torch.save({"state_dict": {}, "meta": 5}, tmp_path / "a.pth")
    assert dataset_meta(tmp_path / "a.pth") == {}
