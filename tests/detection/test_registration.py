"""What is registered in mmdet: found without the other framework, and by configs of the package itself."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("mmdet")
pytestmark = [pytest.mark.dense, pytest.mark.usefixtures("fast_mmengine")]

from mmdet.registry import MODELS  # noqa: E402

import detection.backbone  # noqa: E402, F401
from ssm_mm.config import read_config  # noqa: E402
from ssm_mm.flops import dense_card  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402


@pytest.mark.full
def test_mmsegmentation_is_not_needed():
    code = (
        "import sys; sys.modules['mmseg'] = None; import detection.backbone; from mmdet.registry import MODELS; "
        "print(type(MODELS.build(dict(type='SSMBackbone', name='vssd_nano'))).__name__)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "DenseVSSD", done.stderr


def test_backbone_and_pyramid_of_a_plain_model():
    arguments = {
        "if_fpn": False,
        "patch_size": 16,
        "stride": 16,
        "use_residual_as_feature": True,
        "last_layer_process": "add",
    }
    backbone = MODELS.build({"type": "SSMBackbone", "name": "vim_nano", "out_indices": [5], "model_args": arguments})
    neck = MODELS.build({"type": "SimpleFeaturePyramid", "in_channels": backbone.out_channels, "out_channels": 8})
    sides = [level.shape[2:] for level in neck(backbone(torch.randn(1, 3, 64, 96)))]
    assert [tuple(side) for side in sides] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", 267e9),
        ("mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py", 262e9),
    ],
)
def test_baselines_of_the_package(name, published):
    """Swin-T and ConvNeXt-T, with the FLOPs that their authors give at 1280x800."""
    cfg = read_config(name)
    cfg.model.backbone.init_cfg = None  # a download
    assert dense_card(cfg, (800, 1280)).macs == pytest.approx(published, rel=0.01)


def test_configs_of_the_package():
    cfg = read_config("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", {"train_cfg.max_epochs": 3})
    assert cfg.model.backbone.type == "SwinTransformer" and cfg.train_cfg.max_epochs == 3
    for name, message in {"mmdet::swin/none.py": "none.py", "mmpose::x.py": "mmpose"}.items():
        with pytest.raises(UserError, match=message):
            read_config(name)
