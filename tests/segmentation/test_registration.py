"""What is registered in mmsegmentation: found without the other framework, beside the package's own backbones."""

import subprocess
import sys

import pytest

pytest.importorskip("mmseg")
pytestmark = [pytest.mark.dense, pytest.mark.usefixtures("fast_mmengine")]

from ssm_mm.config import read_config  # noqa: E402
from ssm_mm.flops import dense_card  # noqa: E402


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py", 945e9),
        ("mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py", 939e9),
    ],
)
def test_baselines_of_the_package(name, published):
    """Swin-T and ConvNeXt-T, with the FLOPs that their authors give at 512x2048."""
    cfg = read_config(name)
    cfg.model.backbone.init_cfg = None  # a download
    assert dense_card(cfg, (512, 2048)).macs == pytest.approx(published, rel=0.01)


@pytest.mark.full
def test_mmdet_is_not_needed():
    code = (
        "import sys; sys.modules['mmdet'] = None; import segmentation.backbone; from mmseg.registry import MODELS; "
        "print(type(MODELS.build(dict(type='SSMBackbone', name='vmamba_nano'))).__name__)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "DenseVSSM", done.stderr
