"""SSMBackbone answers to the habits of the OpenMMLab packages: with our arguments' names, in one line."""

import pytest
import torch

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from mmengine.config import Config  # noqa: E402
from mmengine.model import BaseModule  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from ssm_mm.backbone import SSMBackbone, check_backbone_type, is_ours  # noqa: E402
from ssm_models import DenseVSSM  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402


def build(**arguments):
    return MODELS.build({"type": "SSMBackbone", "name": "vmamba_nano", **arguments})


def test_what_it_has():
    backbone = build(init_cfg=None, frozen_stages=1, use_checkpoint=True, model_args={"norm_layer": "ln"})
    assert type(backbone) is DenseVSSM and not backbone.patch_embed[0].weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"with_cp": True}, "with_cp is called use_checkpoint here"),
        ({"pretrained": "x.pth"}, "pretrained is called checkpoint here"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "x.pth"}}, "init_cfg must be None: .* by checkpoint=FILE"),
        ({"frozen_stage": 1}, "there is no argument frozen_stage; did you mean frozen_stages?"),
        ({"ssm_d_state": 1}, "ssm_d_state belongs into model_args$"),
        ({"in_channels": 4}, "in_channels belongs into model_args, as in_chans"),
        ({"style": "pytorch"}, "there is no argument style$"),
        ({"depth": 50, "style": "pytorch"}, "style; _delete_=True beside type leaves out what the base config has"),
        ({"model_args": {"frozen_stages": 1}}, "model_args: frozen_stages stands beside model_args$"),
        ({"model_args": {"with_cp": True}}, "model_args: with_cp stands beside model_args, as use_checkpoint"),
        ({"model_args": {"in_channels": 4}}, "model_args: in_channels is called in_chans here"),
        ({"model_args": {"ssm_dstate": 1}}, "model_args: there is no argument ssm_dstate; did you mean ssm_d_state?"),
        ({"name": "vmamba_nan"}, "'vmamba_nan' is not a model of the zoo; did you mean vmamba_nano"),
        ({"out_indices": [7]}, r"out_indices=\(7,\) must name stages 0..2"),
        ({"frozen_stages": 9}, "frozen_stages=9 is not between -1 and 3"),
        ({"checkpoint": "absent.pth"}, "absent.pth is not a file"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(UserError, match=f"^SSMBackbone: .*{message}"):
        build(**arguments)


def test_a_name_in_another_place():
    with pytest.raises(UserError, match="SSMBackbone: type is called name here"):
        SSMBackbone(type="vmamba_nano")
    with pytest.raises(UserError, match="SSMBackbone: .*missing 1 required positional argument: 'name'"):
        SSMBackbone()


@pytest.mark.parametrize("kind", ["SSMBackbone", SSMBackbone, "ssm_mm.backbone.SSMBackbone"])
def test_ways_to_name_the_type(kind):
    backbone = Config({"model": {"backbone": {"type": kind, "name": "vmamba_nano"}}})
    check_backbone_type(backbone)
    assert is_ours(backbone.model.backbone) and type(MODELS.build(backbone.model.backbone)) is DenseVSSM


@pytest.mark.parametrize(
    ("kind", "meant"),
    [
        ("MM_VSSM", 'here it is type="SSMBackbone", name="vmamba_tiny_s1l8"'),
        ("vssd_tiny", 'here it is type="SSMBackbone", name="vssd_tiny"'),
        ("SSMBackbon", "did you mean SSMBackbone?"),
    ],
)
def test_types_that_nobody_registered(kind, meant):
    with pytest.raises(UserError) as caught:
        check_backbone_type(Config({"model": {"backbone": {"type": kind}}}))
    assert f"model.backbone.type {kind} is registered neither" in str(caught.value) and meant in str(caught.value)


def test_mmengine_leaves_the_weights_alone(monkeypatch):
    """Its modules initialise what they hold, which would be over the weights of `checkpoint`."""

    def init_weights(self, *, needs_reset: bool = True) -> None:
        if needs_reset:  # not while it is built
            torch.nn.init.zeros_(self.probe)

    monkeypatch.setattr(DenseVSSM, "init_weights", init_weights)
    model = BaseModule()
    model.backbone = build()
    model.backbone.probe = torch.nn.Parameter(torch.ones(1))
    model.init_weights()
    assert model.backbone.probe.item() == 1
