"""Linear layers in eight bits, by PyTorch's `quantize_dynamic`: what the digits say of a trained model."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

from analyze import inputs, quick
from analyze.exporting.accuracy import accuracies, labelled_images
from ssm_models import plain_layers


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_dynamic_int8_is_as_accurate_on_digits(quickstart, monkeypatch):
    """Within 0.3 points of the model, that is one image of 355."""
    monkeypatch.chdir(quickstart)
    name = inputs.model_name(None, quick.QUICKSTART)
    model = inputs.load_model(name, quick.QUICKSTART)
    quantised = quantize_dynamic(plain_layers(model), {nn.Linear}, dtype=torch.qint8)
    source = labelled_images(quick.DIGITS, quick.QUICKSTART, model.num_classes)
    transform = inputs.evaluation_transform(name, quick.QUICKSTART)
    found = accuracies({"float32": model, "int8": quantised}, source, transform)
    assert found["float32"].images == 355 and found["float32"].top1 > 50
    assert abs(found["int8"].top1 - found["float32"].top1) <= 0.3
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert not torch.equal(model(images), quantised(images))
