"""DenseBackbone: maps of any model of the zoo, its weights, and what of it does not train."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import ssm_models
from ssm_models import CheckpointError, DenseBackbone
from ssm_models.layers.simple_fpn import SimpleFeaturePyramid

NANOS = {
    "vmamba_nano": [32, 64, 128],
    "vssd_nano": [32, 64, 128],
    "vssd_nano_iccv2025": [32, 64, 128],
    "vim_nano": [64, 64, 64, 64],
}


@pytest.fixture(params=NANOS)
def name(request):
    return request.param


def test_maps_of_any_size(name):
    backbone = DenseBackbone(name).eval()
    assert backbone.out_channels == NANOS[name]
    for height, width in ((64, 96), (37, 53)):
        maps = backbone(torch.randn(2, 3, height, width))
        assert [x.shape[1] for x in maps] == NANOS[name] and all(x.is_contiguous() for x in maps)
        for level, x in enumerate(maps):
            stride = 4 << level
            assert all(abs(n - pixels / stride) <= 1 for n, pixels in zip(x.shape[2:], (height, width), strict=True))


def test_maps_are_normed_stages():
    """Map i is the i-th stage's output before its downsampling, normed by outnorm{i}."""
    backbone = DenseBackbone("vssd_nano", out_indices=(0, 2)).eval()
    images, kept = torch.randn(1, 3, 32, 48), []
    backbone.layers[2].blocks.register_forward_hook(lambda module, inputs, out: kept.append(out))
    first, last = backbone(images)
    expected = F.layer_norm(kept[0], (128,), backbone.outnorm2.weight, backbone.outnorm2.bias)
    torch.testing.assert_close(last, expected.permute(0, 3, 1, 2))
    assert set(dict(backbone.named_children())) == {"patch_embed", "layers", "outnorm0", "outnorm2"}


def test_weights_of_a_classifier_and_of_another_model(tmp_path):
    classifier = ssm_models.VSSM(**ssm_models.vssm.VARIANTS["vmamba_nano"], num_classes=7)
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    backbone = DenseBackbone("vmamba_nano", checkpoint=tmp_path / "weights.safetensors")
    own = {key: value for key, value in backbone.state_dict().items() if not key.startswith("outnorm")}
    assert len(own) > 40 and all(torch.equal(value, classifier.state_dict()[key]) for key, value in own.items())
    with pytest.raises(CheckpointError, match="does not fit this DenseVSSD: missing"):
        DenseBackbone("vssd_nano", checkpoint=tmp_path / "weights.safetensors")


def test_frozen_stages(name):
    """Frozen parts keep weights and statistics through training; everything behind them trains."""
    backbone = DenseBackbone(name, frozen_stages=1, drop_path_rate=0.0).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum((x * torch.randn_like(x)).sum() for x in backbone(torch.randn(2, 3, 32, 32))).backward()
    optimizer.step()
    frozen = ("patch_embed.", "layers.0.", "pos_embed", "outnorm0.")
    for key, value in backbone.state_dict().items():
        if key.startswith(frozen):
            assert torch.equal(value, before[key]), key
    later = {key: value for key, value in backbone.named_parameters() if key.startswith(("layers.1.", "outnorm1."))}
    assert later and not any(torch.equal(value, before[key]) for key, value in later.items())
    assert not backbone.layers[0].training and not backbone.patch_embed.training and backbone.layers[1].training
    assert all(p.requires_grad for p in DenseBackbone(name).parameters())
    assert not any(p.requires_grad for p in DenseBackbone(name, frozen_stages=0).patch_embed.parameters())


def test_norm_eval_keeps_statistics():
    images = torch.randn(2, 3, 32, 32) + 3
    for norm_eval in (True, False):
        backbone = DenseBackbone("vssd_nano", norm_eval=norm_eval).train()
        statistics = [value for key, value in backbone.named_buffers() if key.endswith("running_mean")]
        before = [value.clone() for value in statistics]
        backbone(images)
        assert len(statistics) > 1
        moved = [not torch.equal(a, b) for a, b in zip(statistics, before, strict=True)]
        assert not any(moved) if norm_eval else all(moved)
        assert backbone.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("vmamba_nanno",), ValueError, "'vmamba_nanno' is not a model of the zoo; did you mean vmamba_nano"),
        (("vmamba_nano", (0, 3)), ValueError, r"out_indices=\(0, 3\) must name stages 0..2"),
        (("vmamba_nano", None, "absent.pth"), CheckpointError, "absent.pth is not a file"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        DenseBackbone(*arguments)


def test_mistaken_options():
    with pytest.raises(ValueError, match="frozen_stages=4 is not between -1 and 3"):
        DenseBackbone("vmamba_nano", frozen_stages=4)
    with pytest.raises(TypeError, match="ssm_ration"):
        DenseBackbone("vmamba_nano", model_args={"ssm_ration": 1.0})


def test_simple_feature_pyramid():
    """Levels of strides 4 to 64, each normed; the third is two convolutions of the map, and keys are as published."""
    pyramid = SimpleFeaturePyramid([32], 16)
    x = torch.randn(2, 32, 6, 10)
    levels = pyramid((x,))
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 24, 40), (2, 16, 12, 20), (2, 16, 6, 10), (2, 16, 3, 5), (2, 16, 2, 3),
    ]  # fmt: skip
    first, second = pyramid.simfp_4
    inside = F.layer_norm(F.conv2d(x, first.weight).permute(0, 2, 3, 1), (16,), eps=1e-6).permute(0, 3, 1, 2)
    outside = F.layer_norm(F.conv2d(inside, second.weight, padding=1).permute(0, 2, 3, 1), (16,), eps=1e-6)
    torch.testing.assert_close(levels[2], outside.permute(0, 3, 1, 2))
    torch.testing.assert_close(levels[4], levels[3][..., ::2, ::2])
    assert {key.split(".")[0] for key in pyramid.state_dict()} == {"simfp_2", "simfp_3", "simfp_4", "simfp_5"}
    with pytest.raises(ValueError, match="num_outs=3"):
        SimpleFeaturePyramid(32, num_outs=3)


@pytest.mark.parametrize("name", ["vmamba_nano", "vssd_nano"])
def test_recomputed_activations(name):
    """Same maps and gradients, with less kept in between; also compiled, in one graph."""
    images, results = torch.randn(1, 3, 64, 64), {}
    for recompute in (False, True):
        torch.manual_seed(1)
        backbone = DenseBackbone(name, drop_path_rate=0.0, recompute_act=recompute)
        kept: dict[int, int] = {}

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            maps = backbone(images)
        sum(x.square().sum() for x in maps).backward()
        results[recompute] = [*maps, *(p.grad for p in backbone.parameters())], sum(kept.values())
    for expected, found in zip(results[False][0], results[True][0], strict=True):
        torch.testing.assert_close(found, expected)
    assert results[True][1] < 0.9 * results[False][1]
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images)[0], results[True][0][0])
