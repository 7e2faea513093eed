"""Effective receptive fields: of convolutions whose fields are known, squares that hold a share, and the command."""

import csv
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from analyze import image_files
from analyze.erf import main
from analyze.impl import erf
from ssm_train.common.errors import UserError


def convolutions(depth: int, kernel: np.ndarray, channels: int = 2) -> nn.Sequential:
    """`depth` convolutions of one 2-D kernel for every pair of channels."""
    layers = [nn.Conv2d(3 if i == 0 else channels, channels, len(kernel), padding="same") for i in range(depth)]
    for layer in layers:
        layer.weight.data = torch.tensor(kernel).float().expand_as(layer.weight).clone()
        layer.bias.data.zero_()
    return nn.Sequential(*layers).double()


def images(count: int, size: int) -> list[torch.Tensor]:
    return list(torch.rand(count, 1, 3, size, size).double())


def test_field_of_3x3_convolutions():
    """n of them see (2n + 1)^2 pixels, with the numbers of paths between: coefficients of (1 + x + x^2)^n."""
    for depth in (1, 2, 4):
        paths = np.polynomial.polynomial.polypow([1, 1, 1], depth)
        expected = np.pad(np.outer(paths, paths), 7 - depth) * 2**depth * 3  # channels on the way, colours
        field = erf.receptive_field(convolutions(depth, np.ones((3, 3))), images(2, 15))
        np.testing.assert_allclose(field, expected, rtol=1e-12, atol=0)
        assert (field > 0).sum() == (2 * depth + 1) ** 2
        assert erf.squares(field, [1.0])[0] == (1.0, 2 * depth + 1, (2 * depth + 1) ** 2 / 15**2)


def test_field_of_binomial_kernels():
    """n convolutions with (1 2 1) x (1 2 1) have the binomial coefficients of 2n."""
    binomial = [math.comb(6, k) for k in range(7)]
    field = erf.receptive_field(convolutions(3, np.outer([1, 2, 1], [1, 2, 1]), 1), images(1, 9))
    np.testing.assert_allclose(field, np.pad(np.outer(binomial, binomial), 1) * 3.0, rtol=1e-12)


def test_what_is_rectified():
    """Neither negative gradients nor those of negative features count."""
    kernel = np.array([[0, 0, 0], [-1, 2, 3], [0, 0, 0]])
    ramp = torch.arange(5.0).double().expand(1, 3, 5, 5)
    field = erf.receptive_field(convolutions(1, kernel, 1), [ramp])
    assert np.argwhere(field).tolist() == [[2, 2], [2, 3]] and field[2, 2] == 6 and field[2, 3] == 9
    assert not erf.receptive_field(convolutions(1, kernel, 1), [-ramp]).any()


def test_images_are_averaged_and_infinite_ones_left_out():
    def features(image):
        return image * image  # gradient 2 x

    one, two, bad = torch.ones(1, 3, 4, 4), torch.full((1, 3, 4, 4), 2.0), torch.full((1, 3, 4, 4), math.nan)
    field = erf.receptive_field(features, [one, bad, two])
    assert field[2, 2] == 3 * (2 + 4) / 2 and field.sum() == field[2, 2]  # an even side has its middle at side // 2
    with pytest.raises(UserError, match="finite"):
        erf.receptive_field(features, [bad])


def test_squares_of_even_fields():
    uniform = np.ones((9, 9))
    sides = {0.2: 5, 0.3: 5, 0.5: 7, 0.99: 9}  # 25, 25, 49, 81 of 81 pixels
    assert [(s.share, s.side) for s in erf.squares(uniform)] == list(sides.items())
    assert [s.area for s in erf.squares(uniform)] == pytest.approx([side**2 / 81 for side in sides.values()])
    # of 8x8 pixels the middle is (4, 4): a square of 7 holds 49 of 64, and the next is the whole image
    assert [(s.side, s.area) for s in erf.squares(np.ones((8, 8)), [49 / 64, 0.77])] == [(7, 49 / 64), (8, 1)]
    point = np.zeros((8, 8))
    point[4, 4] = 3
    assert [(s.side, s.area) for s in erf.squares(point, [0.2, 1])] == [(1, 1 / 64)] * 2


@pytest.mark.parametrize(
    "name, middle",
    [
        ("vmamba_nano", lambda model: (model.layers[-1].blocks, lambda y: y[0, :, 2, 2])),
        ("vssd_nano", lambda model: (model.layers[-1].blocks, lambda y: y[0, 2, 2])),
        ("vim_nano", lambda model: (model.layers[-1], lambda y: (y[0] + y[1])[0, 8 * 16 + 8 + 1])),
        ("resnet10t", lambda model: (model.layer4, lambda y: y[0, :, 1, 1])),
    ],
)
def test_field_of_models(name, middle):
    """The features are the last stage's before any norm, taken in the middle: by a hook, against the whole."""
    torch.manual_seed(0)
    model, image = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    module, select = middle(model)
    seen = []
    module.register_forward_hook(lambda _, args, output: seen.append(output))
    x = image.clone().requires_grad_()
    model(x)
    gradient = torch.autograd.grad(select(seen[0]).relu().sum(), x)[0]
    field = erf.receptive_field(erf.features_of(model, name, 64), [image])
    expected = gradient.relu().sum((0, 1)).double().numpy()
    assert expected.max() > 0
    np.testing.assert_allclose(field, expected, rtol=1e-3, atol=1e-6 * expected.max())


def test_models_without_maps_are_refused():
    with pytest.raises(UserError, match="no feature maps"):
        erf.features_of(nn.Linear(1, 1), "line", 32)


# ---- the command ----


@pytest.fixture
def photos(tmp_path):
    """Three images of different sizes and modes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (mode, size) in enumerate((("L", (20, 30)), ("RGBA", (40, 40)), ("CMYK", (33, 21)))):
        bands = np.random.default_rng(i).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
        Image.fromarray(bands.squeeze(), mode=mode).save(folder / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
    return folder


def test_command(photos, tmp_path, capsys):
    """Before and after, side by side: fields, table and csv are those of the models and their weights."""
    torch.manual_seed(5)
    trained = timm.create_model("vssd_nano", num_classes=4).eval()
    file, out = tmp_path / "trained.pth", tmp_path / "deep" / "erf.png"
    torch.save({"model": trained.state_dict()}, file)
    args = ["--models", "vmamba_nano", "vssd_nano", "--checkpoints", "-", str(file), "--images", str(photos)]
    assert main([*args, "--size", "48", "--num", "9", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    fields = np.load(out.with_suffix(".npz"))
    assert sorted(fields.files) == ["vmamba_nano", "vssd_nano", "vssd_nano_trained"]
    paths = sorted(photos.iterdir())
    pictures = [image_files.to_tensor(image_files.read_image(path), "vssd_nano", (48, 48)) for path in paths]
    expected = erf.receptive_field(erf.features_of(trained, "vssd_nano", 48), pictures)
    np.testing.assert_allclose(fields["vssd_nano_trained"], expected, rtol=1e-4, atol=1e-6 * expected.max())
    assert not np.allclose(fields["vssd_nano"], expected, rtol=0.1, atol=0)

    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [(row["model"], row["weights"]) for row in rows[::4]] == [
        ("vmamba_nano", "random weights"),
        ("vssd_nano", "random weights"),
        ("vssd_nano", "trained.pth"),
    ]
    for row, square in zip(rows[8:], erf.squares(fields["vssd_nano_trained"]), strict=True):
        assert (float(row["share"]), int(row["side_px"]), float(row["area_share"])) == square
        assert f"{square.side} px ({100 * square.area:.1f} %)" in printed
    assert printed.endswith("".join(f"{out.with_suffix(suffix)}\n" for suffix in (".png", ".csv", ".npz")))
    assert Image.open(out).size == (825, 1230)


def test_transformers_take_the_size(photos, tmp_path):
    """A ViT of 224 pixels is brought to another grid."""
    out = tmp_path / "erf.png"
    args = ["--models", "deit_tiny_patch16_224", "--images", str(photos), "--size", "64", "--num", "1"]
    assert main([*args, "--out", str(out)]) == 0
    field = np.load(out.with_suffix(".npz"))["deit_tiny_patch16_224"]
    assert field.shape == (64, 64) and field[32:48, 32:48].sum() > 0.1 * field.sum() and (field > 0).mean() > 0.2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--models", "vmamba_nono"], "vmamba_nano"),
        (["--models", "vim_nano", "vim_nano"], "twice"),
        (["--checkpoints", "a", "b"], "2 for 1 models"),
        (["--models", "vim_nano", "vmamba_nano", "--checkpoints", "-", "missing"], "missing"),
        (["--models", "vim_nano", "--checkpoints", "vmamba.pth"], "vmamba.pth"),
        (["--models", "vim_nano", "--size", "3"], "3x3 pixels"),
        (["--size", "0"], "--size is 0"),
        (["--out", "erf.npz"], "does not end in .png"),
        (["--num", "0"], "--num is 0"),
        (["--images", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(args, message, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": timm.create_model("vmamba_nano").state_dict()}, "vmamba.pth")
    args = args if "--images" in args else [*args, "--images", str(photos)]
    args = args if "--models" in args else ["--models", "vmamba_nano", *args]
    args = args if "--size" in args else [*args, "--size", "32"]
    assert main(["--out", "erf.png", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "erf.png").exists()


# ---- weights ----


def test_neutral_weights_open_closed_blocks():
    """timm closes the blocks of a new ResNet and nearly closes ConvNeXt's: only the stem and downsampling are seen."""
    image = torch.randn(1, 3, 96, 96)
    for name in ("resnet10t", "convnext_atto_ols", "swinv2_cr_tiny_ns_224"):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        before = erf.squares(erf.receptive_field(erf.features_of(model, name, 96), [image]), [0.99])[0].side
        erf.make_neutral(model)
        after = erf.squares(erf.receptive_field(erf.features_of(model, name, 96), [image]), [0.99])[0].side
        assert after > before, (name, before, after)
    ours = timm.create_model("vssd_nano").eval()
    kept = {key: value.clone() for key, value in ours.state_dict().items()}
    erf.make_neutral(ours)
    assert all(torch.equal(value, kept[key]) for key, value in ours.state_dict().items())


def test_missing_weights_are_found_before_the_work(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(erf, "receptive_field", lambda *_: pytest.fail("the work has begun"))
    line = ["--images", str(photos), "--out", str(tmp_path / "erf.png"), "--model", "vmamba_nano", "vim_nano"]
    for given, message in (
        (["-", str(tmp_path / "none.pth")], "none.pth is neither a file"),
        (["-", "vim_nano.published"], "vim_nano.published"),
    ):
        assert main([*line, "--checkpoint", *given]) == 2
        assert message in capsys.readouterr().err


def test_pretrained(photos, tmp_path, monkeypatch):
    """timm's own weights, below the random ones, of every model without a checkpoint."""
    asked, create = [], timm.create_model

    def create_model(name, pretrained=False, **arguments):
        asked.append((name, pretrained))
        torch.manual_seed(9 if pretrained else 0)
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    out = tmp_path / "erf.png"
    assert (
        main(["--model", "resnet10t", "--pretrained", "--images", str(photos), "--size", "32", "--out", str(out)]) == 0
    )
    assert asked == [("resnet10t", False), ("resnet10t", True)]
    weights = [row["weights"] for row in csv.DictReader(out.with_suffix(".csv").open())]
    assert weights == ["random weights"] * 4 + ["pretrained"] * 4
    fields = np.load(out.with_suffix(".npz"))
    assert not np.allclose(fields["resnet10t"], fields["resnet10t_trained"], rtol=0.1, atol=0)


def test_weights_that_cannot_be_had(photos, tmp_path, capsys):
    line = ["--images", str(photos), "--size", "32", "--out", str(tmp_path / "erf.png")]
    assert main([*line, "--model", "vmamba_nano", "--pretrained"]) == 2
    assert "error: --pretrained: no weights of vmamba_nano to be had" in capsys.readouterr().err


def test_preset(monkeypatch):
    """Models and settings of the figure, each of which may be given otherwise."""
    asked = []
    monkeypatch.setattr("analyze.cli.start", lambda name, args: asked.append(args) or 0)
    main(["--preset", "vmamba"])
    main(["--preset", "vmamba", "--size", "224", "--model", "vim_nano"])
    main([])
    assert [(args.size, args.num) for args in asked] == [(1024, 50), (224, 50), (128, 50)]
    assert asked[0].model[0] == "resnet50" and all(timm.is_model(name) for name in asked[0].model)
    assert asked[1].model == ["vim_nano"] and asked[2].model is None
