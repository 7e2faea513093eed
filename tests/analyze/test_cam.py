"""Class activation maps against closed forms and autograd."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from analyze.cam import main
from analyze.impl import cam
from analyze.inputs import build_model, evaluation_transform
from ssm_train.common.errors import UserError

SIZE = (48, 32)


class Toy(nn.Module):
    """Channels, mean over the map, linear: Grad-CAM is relu(sum_c w_c x_c) / places."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv2d(3, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.maps(x).mean((2, 3)))


def test_gradcam_of_a_linear_model_is_the_closed_form():
    model, image = Toy().eval(), torch.randn(1, 3, 6, 8)
    found = cam.compute(model, model.maps, image, 2, "gradcam")
    with torch.no_grad():
        expected = torch.einsum("c,chw->hw", model.head.weight[2], model.maps(image)[0]) / 48
    np.testing.assert_allclose(found.weights, model.head.weight[2].detach() / 48, rtol=1e-5)
    np.testing.assert_allclose(found.raw, expected, atol=1e-6)
    positive = expected.clamp_min(0)  # the map is as large as the image here, so nothing is enlarged
    scaled = (positive - positive.min()) / (positive - positive.min()).max()
    np.testing.assert_allclose(found.overlay, scaled, atol=1e-5)


def test_eigencam_finds_the_direction_of_change():
    """A pattern times a vector plus a constant: the component is that pattern, its larger extreme up."""
    pattern = torch.randn(6, 8)
    pattern -= pattern.mean()
    model = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.register_parameter("any", nn.Parameter(torch.zeros(1)))
    image = pattern * torch.tensor([1.0, -2.0, 2.0])[:, None, None] + 7
    found = cam.compute(model, model[0], image[None], 0, "eigencam")
    sign = 1 if pattern.max() > -pattern.min() else -1
    np.testing.assert_allclose(found.raw, 3 * sign * pattern, atol=1e-4)
    assert found.weights.size == 0


def features_and_logits(name, model, image):
    """What the default layer gives, how it becomes (C, h, w), and the logits that follow from it."""
    if name == "vim_nano":
        tokens = []
        handle = model.layers[-1].norm.register_forward_hook(lambda _m, _i, output: tokens.append(output))
        logits = model(image)
        handle.remove()
        grid = model.patch_embed.grid(*SIZE)
        middle = grid[0] * grid[1] // 2
        keep = [row for row in range(tokens[0].shape[1]) if row != middle]
        return tokens[0], lambda t: t[0, keep].T.reshape(-1, *grid), logits
    x = model.forward_features(image)  # nothing comes after the last block here
    last = model.output_fmt == "NHWC"
    return x, lambda t: t[0].permute(2, 0, 1) if last else t[0], model.forward_head(x)


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_weights_are_autograds(name):
    """Channel weights are the mean gradients of the logit, maps their sum, for all layouts and images that are not
    square."""
    model, image = build_model(name), torch.randn(1, 3, *SIZE)
    found = cam.compute(model, cam.find_layer(model, None), image, 3, "gradcam")
    activations, to_map, logits = features_and_logits(name, model, image)
    (gradient,) = torch.autograd.grad(logits[0, 3], activations)
    weights = to_map(gradient).mean((1, 2))
    np.testing.assert_allclose(found.weights, weights, rtol=1e-3, atol=1e-4 * weights.abs().max().item())
    expected = torch.einsum("c,chw->hw", weights, to_map(activations.detach()))
    np.testing.assert_allclose(found.raw, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert found.overlay.shape == SIZE and found.overlay.min() == 0 and found.overlay.max() == pytest.approx(1)


def test_layouts_agree():
    """VMamba computed in NHWC and in NCHW has the same map."""
    first, last = (timm.create_model("vmamba_nano", norm_layer=norm).eval() for norm in ("ln2d", "ln"))
    last.load_state_dict(first.state_dict())
    image = torch.randn(1, 3, *SIZE)
    for layer in ("layers.1.blocks", "layers.1.blocks.0.op.conv2d"):
        maps = [cam.compute(m, cam.find_layer(m, layer), image, 0, "gradcam").raw for m in (first, last)]
        assert maps[0].shape == (6, 4)
        np.testing.assert_allclose(*maps, rtol=1e-3, atol=1e-4 * np.abs(maps[0]).max())


def test_layers_without_a_map():
    model, image = build_model("vim_nano"), torch.randn(1, 3, *SIZE)
    for name, message in (
        ("layers.5", "gives a tuple, which is no map"),
        ("norm_f", "Grad-CAM is 0 everywhere"),  # only the class token counts there
        ("head", r"gives \(1, 10\), which is no map"),
    ):
        with pytest.raises(UserError, match=message):
            cam.compute(model, cam.find_layer(model, name), image, 0, "gradcam")
    with pytest.raises(UserError, match="--layer layers.9 is no module of the model; for example layers.0"):
        cam.find_layer(model, "layers.9")


def test_command(tmp_path, monkeypatch, capsys):
    """The npz holds what `compute` gives for the picture, and the class asked for or the predicted one."""
    model = build_model("vssd_nano")
    monkeypatch.setattr(cam.inputs, "load_model", lambda name, checkpoint, which, allow_nonfinite: model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8))
    image.save(tmp_path / "grey.png")
    line = ["--model", "vssd_nano", "--images", str(tmp_path / "grey.png"), "--size", "48"]
    out = tmp_path / "deep" / "cam.png"
    # as predict.py prepares it: the shorter side to the size by the model's crop_pct, then its centre
    pixels = evaluation_transform("vssd_nano", None, 48)(image.convert("RGB"))[None]
    with torch.inference_mode():
        predicted = model(pixels).argmax().item()
    for more, target in (([], predicted), (["--class", "class 7"], 7), (["--class", "2"], 2)):
        assert main([*line, "--out", str(out), *more]) == 0
        data = np.load(out.with_suffix(".npz"))
        assert data["classes"].tolist() == [target] and data["images"].tolist() == [str(tmp_path / "grey.png")]
        expected = cam.compute(model, cam.find_layer(model, None), pixels, target, "gradcam")
        for part, value in expected._asdict().items():
            np.testing.assert_allclose(data[f"0_gradcam_{part}"], value, rtol=1e-4, atol=1e-7)
        assert data["0_eigencam_overlay"].shape == (48, 48)
    assert capsys.readouterr().out.endswith(f"{out}\n{out.with_suffix('.npz')}\n")
    for more, message in (
        (["--class", "10"], "--class 10 is neither the name of a class nor a number from 0 to 9"),
        (["--layer", "layers.7"], "--layer layers.7 is no module"),
        (["--out", "cam.jpg"], "--out cam.jpg does not end in .png"),
        (["--images", "nowhere"], "nowhere does not exist"),
        (["--size", "0"], "--size 0 is not a number of pixels"),
    ):
        assert main([*line, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("count, columns", [(1, 1), (20, 3)])
def test_a_sheet_is_a_grid(count, columns):
    """Every image with its maps beside it, rows filled from left to right."""
    maps = {method: cam.Cam(np.eye(4), np.eye(4), np.zeros(0)) for method in cam.METHODS}
    images = [torch.full((1, 4, 4), number / count) for number in range(count)]
    figure = cam.draw(images, [maps] * count, [f"image {number}" for number in range(count)], "title")
    figure.draw_without_rendering()
    drawn = [axes for axes in figure.axes if axes.images]
    first = [axes for axes in drawn if axes.get_title(loc="left")]
    assert len(drawn) == 3 * count + 1 * (drawn[-1].get_label() == "<colorbar>")
    assert [axes.get_title(loc="left") for axes in first] == [f"image {number}" for number in range(count)]
    assert [axes.images[0].get_array()[0, 0, 0] for axes in first] == pytest.approx([n / count for n in range(count)])
    assert len({round(axes.get_position().x0, 4) for axes in first}) == columns
