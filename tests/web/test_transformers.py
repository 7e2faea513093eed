"""The hub's folders in transformers, which `bash run_tests.sh --web` installs beside .venv."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from analyze.impl.hub import save_model

pytestmark = pytest.mark.web

MODELS = {
    "vmamba": ("vmamba_nano", {"ssm_d_state": 2}),
    "vmamba_m2": ("vmamba_tiny_m2", {"depths": [1, 1, 1, 1], "dims": 32}),
    "vim": ("vim_nano", {"if_rope": True, "cls_mode": "double"}),
    "vim_wide": ("vim_nano", {"img_size": (16, 48)}),
    "vssd": ("vssd_nano", {"depths": [1, 1, 2]}),
    "vssd_iccv2025": ("vssd_nano_iccv2025", {}),
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="pip install -r requirements-web.txt")


@pytest.mark.parametrize("case", MODELS)
def test_logits_and_labels_are_timms(case, transformers, tmp_path):
    name, arguments = MODELS[case]
    model = timm.create_model(name, num_classes=3, **arguments).eval()
    save_model(model, tmp_path, ["ant", "bee", "cat"], {})
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=0, atol=1e-6)
        features = transformers.AutoModel.from_pretrained(tmp_path).eval()(x).pooler_output
        torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))
    assert theirs.config.id2label == {0: "ant", 1: "bee", 2: "cat"}


def test_a_pipeline(transformers, tmp_path):
    model = timm.create_model("vssd_nano", num_classes=3).eval()
    save_model(model, tmp_path, ["ant", "bee", "cat"], {"input_size": (3, 48, 48), "crop_pct": 0.8})
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    said = transformers.pipeline("image-classification", model=str(tmp_path))(image, top_k=3)
    settings = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert settings["input_size"] == (3, 48, 48) and settings["crop_pct"] == 0.8
    with torch.no_grad():
        expected = model(create_transform(**settings)(image)[None]).softmax(-1)[0]
    found = {answer["label"]: answer["score"] for answer in said}
    assert found == pytest.approx(dict(zip(["ant", "bee", "cat"], expected.tolist(), strict=True)), abs=1e-5)


def test_what_is_said_without_our_import(transformers, tmp_path):
    save_model(timm.create_model("vssd_nano", num_classes=3), tmp_path, ["ant", "bee", "cat"], {})
    code = f"""
import timm
from transformers import AutoModelForImageClassification
for load in (lambda: timm.create_model("local-dir:{tmp_path}", pretrained=True),
             lambda: AutoModelForImageClassification.from_pretrained("{tmp_path}")):
    try:
        load()
    except (RuntimeError, ImportError) as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "RuntimeError Unknown model (vssd_nano)"
    assert second.startswith("ImportError The model architecture 'vssd_nano' is not supported in your version of timm")
