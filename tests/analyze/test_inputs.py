"""Models, weights and images as users name them."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from analyze import image_files, inputs
from ssm_train.common.command import run as run_command
from ssm_train.common.errors import UserError
from ssm_train.config.defaults import default_config
from ssm_train.data.transforms import eval_transform
from ssm_train.record.checkpoint import Position
from ssm_train.record.store import CheckpointStore

from ..run_meta import META

KWARGS = {"depths": [1, 1], "dims": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a shrunken vmamba_nano with 3 classes at 48 pixels, and its model."""
    folder, cfg = tmp_path_factory.mktemp("run"), default_config()
    cfg.MODEL.NAME, cfg.MODEL.NUM_CLASSES, cfg.DATA.IMG_SIZE = "vmamba_nano", 3, 48
    cfg.MODEL.KWARGS.update(KWARGS)
    model = timm.create_model("vmamba_nano", num_classes=3, **KWARGS).eval()
    store = CheckpointStore(folder / "checkpoints", keep=1)
    meta = {**META, "config": cfg.dump()}
    store.save(Position(1), model=model.state_dict(), ema=None, train_state={}, meta=meta)
    store.link({"best": Position(1)})
    return folder, model, cfg


def same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys() and not one.training
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_checkpoints_of_all_kinds(run, tmp_path):
    """Run and checkpoint folders know their model; files must fit the named one, with as many classes as they have."""
    folder, model, cfg = run
    for path in (folder, folder / "checkpoints" / "best", folder / "checkpoints" / "epoch_0001"):
        same(inputs.load_model("vmamba_nano", path), model)
        assert inputs.model_name(None, path) == "vmamba_nano" and inputs.run_config(path).dump() == cfg.dump()
        assert inputs.image_size(None, "vmamba_nano", path) == (48, 48)
    for name in ("vmamba_nano", "vim_nano", "vssd_nano"):
        full = timm.create_model(name, num_classes=7)
        save_file(full.state_dict(), tmp_path / "weights.safetensors")
        torch.save({"model": full.state_dict(), "epoch": 3}, tmp_path / "official.pth")
        for path in (tmp_path / "weights.safetensors", tmp_path / "official.pth"):
            same(inputs.load_model(name, path), full)
            assert inputs.run_config(path) is None
            assert inputs.image_size(None, name, path) == (32, 32)


def test_checkpoint_mistakes(run, tmp_path):
    folder = run[0]
    save_file(timm.create_model("vim_nano").state_dict(), tmp_path / "vim.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    for name, path, message in (
        ("vim_nano", folder, "is of the model vmamba_nano, not of vim_nano"),
        ("vmamba_nano", tmp_path / "vim.safetensors", "patch_embed"),
        ("vmamba_nano", tmp_path, "is neither a file nor a folder of a finished run or checkpoint"),
        ("vmamba_nano", tmp_path / "text.pth", "text.pth"),
        ("vmamba", folder, "model 'vmamba' is not a registered model; did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            inputs.load_model(name, path)
    with pytest.raises(UserError, match="give --model NAME"):
        inputs.model_name(None, tmp_path / "vim.safetensors")


def test_images_of_any_mode(tmp_path):
    """Grey, alpha, CMYK, palette and, by a range, 16 bit become the RGB they show."""
    grey = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
    colour = np.stack([grey, 255 - grey, grey // 2], 2)
    alpha = np.concatenate([colour, grey[..., None]], 2)
    cmyk = Image.fromarray(np.stack([grey] * 3 + [0 * grey], 2) * np.ones(1, np.uint8)).convert("CMYK")
    for name, image, expected in (
        ("grey.png", Image.fromarray(grey), np.stack([grey] * 3, 2)),
        ("alpha.png", Image.fromarray(alpha), colour),
        ("cmyk.tif", cmyk, np.asarray(cmyk.convert("RGB"))),
        ("palette.png", Image.fromarray(colour).quantize(12), colour),
        ("16bit.png", Image.fromarray(grey.astype(np.uint16) * 256 + 70), np.stack([grey] * 3, 2)),
    ):
        image.save(tmp_path / name)
        found = image_files.read_image(tmp_path / name, image_files.image_decoder(None, (0, 255 * 256)))
        assert found.mode == "RGB" and found.size == (4, 3)
        np.testing.assert_array_equal(np.asarray(found), expected, err_msg=name)
    with pytest.raises(UserError, match=r"16bit.png cannot be read as an image: .*mode I;16 .*by --range"):
        image_files.read_image(tmp_path / "16bit.png")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.PNG").write_bytes(b"damaged")
    (tmp_path / "deep" / "notes.txt").write_text("")
    names = [path.name for path in image_files.find_images([tmp_path / "grey.png", tmp_path])]
    assert names == ["grey.png", "16bit.png", "alpha.png", "cmyk.tif", "a.PNG", "grey.png", "palette.png"]
    with pytest.raises(UserError, match=r"a\.PNG cannot be read as an image"):
        image_files.read_image(tmp_path / "deep" / "a.PNG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        image_files.find_images([tmp_path / "empty"])


def test_pixels(run):
    """Resizing, cropping and normalising, as trained (a run), as published (a model) or as asked."""
    folder, _, cfg = run
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8))
    pixels = image_files.to_tensor(image, "vmamba_nano", (20, 30))
    resized = np.asarray(image.resize((30, 20), Image.Resampling.BICUBIC)) / 255
    expected = torch.tensor((resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(pixels, expected)
    assert image_files.to_tensor(image, "vmamba_nano").shape == (1, 3, 70, 100)
    assert torch.equal(inputs.evaluation_transform("vmamba_nano", folder)(image), eval_transform(cfg)(image))
    assert inputs.evaluation_transform("vmamba_nano", folder, 24)(image).shape == (3, 24, 24)
    published = timm.data.create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875)
    mine = inputs.evaluation_transform("vmamba_tiny_s1l8", None)(image)
    torch.testing.assert_close(mine, published(image))
    assert inputs.evaluation_transform("vmamba_tiny_s1l8", None, 96)(image).shape == (3, 96, 96)
    assert inputs.image_size([64], "vim_nano", None) == (64, 64)
    assert inputs.image_size([64, 48], "vim_nano", folder) == (64, 48)
    for size in ([1, 2, 3], [0]):
        with pytest.raises(UserError, match="is not H or H W"):
            inputs.image_size(size, "vim_nano", None)
    with pytest.raises(UserError, match="--size 0 is not"):
        inputs.evaluation_transform("vim_nano", None, 0)


def test_run_turns_mistakes_into_a_line(capsys):
    def fail():
        raise UserError("two\nlines")

    assert (run_command(lambda: None), run_command(fail)) == (0, 2)
    assert capsys.readouterr().err == "error: two lines\n"
    assert list(inputs.progress(iter("abc"), "letters")) == ["a", "b", "c"]
    if not torch.cuda.is_available():
        assert inputs.find_device("").type == "cpu"
        with pytest.raises(UserError, match="--device cuda: this PyTorch sees no CUDA device"):
            inputs.find_device("cuda")
    with pytest.raises(UserError, match="--device tpu0x"):
        inputs.find_device("tpu0x")
