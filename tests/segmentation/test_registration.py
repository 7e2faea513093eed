"""What is registered in mmsegmentation is found without the other framework."""

import subprocess
import sys

import pytest

pytest.importorskip("mmseg")
pytestmark = pytest.mark.dense


def test_mmdet_is_not_needed():
    code = (
        "import sys; sys.modules['mmdet'] = None; import segmentation.backbone; from mmseg.registry import MODELS; "
        "print(type(MODELS.build(dict(type='SSMBackbone', name='vmamba_nano'))).__name__)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "DenseVSSM", done.stderr
