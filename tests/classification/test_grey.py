"""Networks of one channel, and images of more than 8 bits: from the files to the predictions."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from analyze import predict
from analyze.features import main as features_main
from analyze.impl import features
from analyze.predictions import main as predictions_main
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.data.build import scan_split
from ssm_train.data.dataset import BadImage, load_image
from ssm_train.data.transforms import eval_transform, train_transform
from ssm_train.step.model import build_model
from ssm_train.step.pretrained import Pretrained, start_from

GREY = ("MODEL.KWARGS.in_chans", 1)
# every augmentation at once: the policies draw from all operations, the mixing pairs images
AUGMENTED = ("AUG.HFLIP", 0.5, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.REPROB", 1.0, "AUG.MIXUP", 0.8)
SHORT = ("TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)


@pytest.fixture
def grey_tree(own_tree):
    """The tree with 12-bit data in files of 16 bits, of which one is float."""
    for path in own_tree.rglob("*.png"):
        values = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
        Image.fromarray(values).save(path)
    first = own_tree / "train/cat/0.png"
    Image.fromarray(np.asarray(Image.open(first)).astype(np.float32)).save(first.with_suffix(".tif"))
    first.unlink()
    return own_tree


def test_a_grey_run_of_12_bit_images(cli, grey_tree, tmp_path):
    """Training, evaluation, prediction sheet, features and predictions read them alike."""
    run, data = tmp_path / "run", ("--data-path", grey_tree, "--opts", *GREY, "DATA.RANGE", "0,4080")
    outcome = cli("--output", run, *data, *SHORT, *AUGMENTED)
    assert outcome.status == 0 and "unreadable" not in outcome.out, outcome
    assert json.loads((run / "metrics.json").read_text())["bad_images"] == 0
    assert load_file(run / "checkpoints/best/model.safetensors")["patch_embed.0.weight"].shape[1] == 1
    assert cli("--output", tmp_path / "eval", *data, "--eval", "--resume", run / "checkpoints/best").status == 0
    trained, again = (json.loads((run.parent / name / "metrics.json").read_text()) for name in ("run", "eval"))
    assert again["results"]["model"]["loss"] == pytest.approx(trained["results"]["best"]["loss"], abs=1e-6)

    assert predictions_main(["--run", str(run)]) == 0
    folder = tmp_path / "features"
    assert features_main(["--checkpoint", str(run), "--out", str(folder), "--device", "cpu"]) == 0
    assert features.read_features(folder, "train")[0].isfinite().all()
    assert json.loads((folder / "features.json").read_text())["train"]["images"] == 21
    image = grey_tree / "val/dog/0.png"
    command = ["--checkpoint", str(run), "--images", str(image), "--device", "cpu", "--out", str(tmp_path / "p.png")]
    assert predict.main(command) == 0
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    cfg = load_config(str(run / "config.yaml"))
    model = build_model(cfg).eval()
    model.load_state_dict(load_file(run / f"checkpoints/best/{trained['weights']}.safetensors"))
    values = np.asarray(Image.open(image)).astype(float) / 4080
    pixels = torch.tensor((np.round(values * 255) / 255 - 0.449) / 0.226, dtype=torch.float32)
    shares = model(pixels[None, None]).softmax(-1)[0]
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        shares.sort(descending=True)[0].tolist(), abs=1e-4
    )


def test_without_a_range_they_are_unreadable_by_name(fails, cli, grey_tree, tmp_path, capsys):
    reason = "an image of mode I;16 has more than 8 bits a channel"
    fails(
        *("--output", tmp_path / "a", "--data-path", grey_tree),
        parts=("of 21 training images are unreadable", "cat/0.tif", "the first one: an image of mode F", "DATA.RANGE"),
    )
    assert f"{grey_tree / 'train/cat/1.png'} ({reason}" in (tmp_path / "a/log.txt").read_text()
    arguments = ["--model", "vmamba_nano", "--device", "cpu", "--out", str(tmp_path / "p.png"), "--images"]
    assert predict.main([*arguments, str(grey_tree / "val")]) == 2
    *each, last = capsys.readouterr().err.splitlines()
    assert len(each) == 15 and each[0] == (
        f"{grey_tree / 'val/cat/0.png'} cannot be read as an image: {reason}: say which values are black and white by "
        "--range, e.g. 0,4095 for 12 bits"
    )
    assert last == f"error: none of the 15 images is readable, e.g. {each[0]}"
    assert predict.main([*arguments, str(grey_tree / "val"), "--range", "0", "4095"]) == 0
    assert predict.main([*arguments, str(grey_tree / "val"), "--range", "9", "9"]) == 2
    assert "--range 9 9: the first value must be below the second" in capsys.readouterr().err


def test_every_source_gives_the_config_its_channels_and_range(grey_tree, tiny_cfg):
    def source(*opts):
        return scan_split(load_config(str(tiny_cfg), ["DATA.DATA_PATH", str(grey_tree), *map(str, opts)]), "train")

    assert isinstance(load_image(source(), 0), BadImage)
    colour, grey = (load_image(source("DATA.RANGE", "[0, 4080]", *more), 0) for more in ((), GREY))
    assert (colour.mode, grey.mode) == ("RGB", "L") and colour.getchannel(1) == grey
    values = np.asarray(Image.open(grey_tree / "train/cat/0.tif"))
    assert np.array_equal(np.asarray(grey), np.round(values / 4080 * 255))


@pytest.mark.parametrize(
    "opts",
    [
        ("DATA.IMG_SIZE", "48", "AUG.AUTO_AUGMENT", "original"),
        ("DATA.IMG_SIZE", "48", "AUG.AUTO_AUGMENT", "augmix-m3-w3"),
        ("AUG.AUTO_AUGMENT", "rand-m9-n9-mstd0.5-inc1", "AUG.REPROB", "1.0"),
        ("AUG.THREE_AUGMENT", "True", "AUG.CROP", "simple", "DATA.IMG_SIZE", "48", "AUG.COLOR_JITTER", "0.3"),
        ("AUG.AUTO_AUGMENT", "", "AUG.COLOR_JITTER", "0.4"),
    ],
)
def test_every_augmentation_takes_grey_images(tiny_cfg, opts):
    cfg = load_config(str(tiny_cfg), [*map(str, GREY), *opts])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50), dtype=np.uint8))
    transform, size = train_transform(cfg), cfg.DATA.IMG_SIZE
    for _ in range(40):
        pixels = transform(image)
        assert pixels.shape == (1, size, size) and pixels.isfinite().all()
    flat = eval_transform(cfg)(Image.new("L", (60, 50), 255))
    torch.testing.assert_close(flat, torch.full((1, size, size), (1 - 0.449) / 0.226))


def test_weights_for_rgb_start_a_grey_network(tiny_cfg, tmp_path):
    """It gives the same logits for a grey image as they do for it in RGB, in all three families."""
    for name, kwargs in (("vmamba_nano", {"dims": 8, "depths": [1, 1]}), ("vim_nano", {"depth": 2}), ("vssd_nano", {})):
        content = yaml.safe_load(tiny_cfg.read_text())
        content["MODEL"] = {"NAME": name, "NUM_CLASSES": 3, "DROP_PATH_RATE": 0.0, "KWARGS": {**kwargs, "in_chans": 1}}
        (tmp_path / "grey.yaml").write_text(yaml.safe_dump(content))
        cfg = load_config(str(tmp_path / "grey.yaml"))
        colour = timm.create_model(name, num_classes=3, **kwargs).eval()
        save_file(colour.state_dict(), tmp_path / "rgb.safetensors")
        grey = build_model(cfg).eval()
        start_from(grey, cfg, Pretrained(tmp_path / "rgb.safetensors"))
        image = torch.randn(2, 1, 32, 32)
        torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)))
        # weights of a grey network as they are
        save_file(grey.state_dict(), tmp_path / "grey.safetensors")
        other = build_model(cfg).eval()
        start_from(other, cfg, Pretrained(tmp_path / "grey.safetensors"))
        assert torch.equal(other(image), grey(image))
    four = load_config(str(tmp_path / "grey.yaml"), ["MODEL.NUM_CLASSES", "4"])
    with pytest.raises(UserError, match=r"rgb.safetensors does not fit this VSSD.*head"):
        start_from(build_model(four), four, Pretrained(tmp_path / "rgb.safetensors"))


def test_other_channels_are_refused_before_anything_is_read(fails, cli, tmp_path):
    out = ("--output", tmp_path / "out", "--data-path", tmp_path / "nowhere", "--opts", "MODEL.KWARGS.in_chans")
    for count in (4, 2, 0, "RGB"):
        fails(*out, count, parts=(f"MODEL.KWARGS.in_chans is {count!r}", "1 (grey images) or 3 (RGB)"))
    for mode in ("--throughput", "--traincost"):
        assert cli(mode, "--batch-size", 2, "--opts", *GREY).status == 0
