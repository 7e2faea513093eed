"""What users get wrong, through the real command line: status 2, one line that helps, and nothing left behind."""

import json
import math
import shutil

import pytest
from PIL import Image

from ssm_train import cli as main_module


@pytest.fixture
def out(tmp_path):
    """A run folder that a failing command must not create."""
    folder = tmp_path / "out"
    yield folder
    assert not folder.exists()


def test_command_line(fails, out, tmp_path):
    fails("--output", out, "--frobnicate", 1, parts=("unrecognized arguments: --frobnicate",))
    fails("--output", out, "--batch", 4, parts=("unrecognized arguments: --batch",))
    fails("--output", out, "--batch-size", "many", parts=("--batch-size", "'many'"))
    fails("--output", out, "--batch-size", 0, parts=("DATA.BATCH_SIZE is 0", "at least 1"))
    fails("--output", out, "--amp", "fp8", parts=("--amp", "bf16"))
    fails("--output", out, cfg=tmp_path / "none.yaml", parts=("none.yaml", "--cfg"))
    fails("--output", out, "--resume", "x", "--pretrained", "y", parts=("not both",))


def test_configuration(fails, out, tmp_path):
    fails("--output", out, "--opts", "TRAIN.BASELR", 1, parts=("'TRAIN.BASELR' does not exist", "TRAIN.BASE_LR"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("TRAIN: [1, 2\nDATA: {")
    fails("--output", out, cfg=broken, parts=("broken.yaml is not valid YAML",))
    broken.write_text("TRAIN:\n  EPOCHZ: 3\n")
    fails("--output", out, cfg=broken, parts=("broken.yaml", "'TRAIN.EPOCHZ' does not exist", "TRAIN.EPOCHS"))
    fails("--output", out, "--opts", "MODEL.NAME", "vmamba_nono", parts=("'vmamba_nono'", "vmamba_nano"))
    fails("--output", out, "--opts", "MODEL.KWARGS.detphs", 1, parts=("vmamba_nano cannot be built", "detphs"))
    fails("--output", out, "--opts", "AUG.AUTO_AUGMENT", "bogus", parts=("AUG.AUTO_AUGMENT 'bogus'",))
    odd = ("--batch-size", 3, "--opts", "AUG.MIXUP", 1.0)
    fails("--output", out, *odd, parts=("DATA.BATCH_SIZE is 3", "even"))


def test_device(fails, out, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fails("--output", out, "--device", "cuda", parts=("--device cuda", "--device cpu"))


def test_data_folders(fails, out, own_tree):
    data = ["--output", out, "--data-path"]
    fails(*data, own_tree / "nowhere", parts=(f"{own_tree / 'nowhere'} is not a folder", "train/<class>"))
    fails(*data, "", parts=("no data set given", "--data-path"))
    fails(
        *data,
        own_tree,
        "--opts",
        "MODEL.NUM_CLASSES",
        5,
        parts=("3 class folders", "NUM_CLASSES is 5", "NUM_CLASSES 3"),
    )
    fails(*data, own_tree, "--batch-size", 22, parts=("21 images", "takes 22", "lower --batch-size"))
    (own_tree / "val/dog").rename(own_tree / "val/fox")
    fails(*data, own_tree, parts=(f"class folder 'dog' is in {own_tree / 'train'} but not in {own_tree / 'val'}",))
    for image in (own_tree / "train/eel").iterdir():
        image.unlink()
    fails(*data, own_tree, parts=(f"class folder {own_tree / 'train/eel'} holds no images", ".png"))
    (own_tree / "train/eel/notes.txt").write_text("not an image")
    fails(*data, own_tree, parts=(f"class folder {own_tree / 'train/eel'} holds no images",))
    shutil.rmtree(own_tree / "train/eel")
    shutil.rmtree(own_tree / "val")
    fails(*data, own_tree, "--opts", "MODEL.NUM_CLASSES", 2, parts=("has no folder 'val'",))
    shutil.rmtree(own_tree / "train")
    (own_tree / "train").mkdir()
    fails(*data, own_tree, parts=(f"{own_tree / 'train'} holds no class folders",))
    shutil.rmtree(own_tree / "train")
    fails(*data, own_tree, parts=("has no folder 'train'",))


def test_existing_run_is_not_overwritten(cli, fails, tmp_path):
    run = tmp_path / "runs"
    assert cli("--output", run, "--tag", "a", "--opts", "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0).status == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    fails("--output", run, "--tag", "a", parts=(f"{run / 'a'} already holds a run", "--tag", "--resume auto"))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    (tmp_path / "file").write_text("mine")
    fails("--output", tmp_path / "file", parts=(f"cannot write to run folder {tmp_path / 'file'}", "--output"))
    assert (tmp_path / "file").read_text() == "mine"


def test_unreadable_images(cli, fails, own_tree, read_log, tmp_path):
    """Named once, counted, replaced in training and left out of validation; above the limit the run stops."""
    for name in ("train/cat/2.png", "train/dog/6.png", "val/eel/0.png"):
        (own_tree / name).write_bytes((own_tree / name).read_bytes()[:100])
    data = ["--data-path", own_tree, "--output"]
    outcome = cli(*data, tmp_path / "run")
    assert outcome.status == 0, outcome
    for name in ("train/cat/2.png", "train/dog/6.png"):
        assert outcome.out.count(f"unreadable image, replaced by the next readable one: {own_tree / name}") == 1
    assert outcome.out.count(f"unreadable image, left out of the metrics: {own_tree / 'val/eel/0.png'}") == 1
    assert [(entry["images"], entry["excluded"]) for entry in read_log(tmp_path / "run", "val")] == [(14, 1)] * 2
    assert all(math.isfinite(entry["loss"]) for entry in read_log(tmp_path / "run", "train"))
    quarantined = json.loads((tmp_path / "run/bad_images.json").read_text())
    assert list(quarantined) == [str(own_tree / "train/cat/2.png"), str(own_tree / "train/dog/6.png")]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["bad_images"] == 2
    assert "2 unreadable training images were replaced" in outcome.out
    # evaluation alone reports it, too
    assert cli(*data, tmp_path / "eval", "--eval", "--resume", tmp_path / "run/checkpoints/last").status == 0
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert (metrics["images"], metrics["excluded"]) == (14, 1)
    line = fails(
        *data,
        tmp_path / "limit",
        "--opts",
        "DATA.MAX_BAD_SHARE",
        0.05,
        parts=("2 of 21", "allows 1 of 21", "cat/2.png"),
    )
    assert "dog/6.png" in line
    assert {path.name for path in (tmp_path / "limit/checkpoints").iterdir()} == {"epoch_0000", "last"}
    for image in (own_tree / "val").rglob("*.png"):
        image.write_bytes(b"")
    fails(*data, tmp_path / "blind", parts=("no validation image", str(own_tree)))


def test_huge_image_is_a_bad_image(cli, own_tree, tmp_path, monkeypatch):
    """Pillow refuses what would fill the memory; the limit is lowered to make a small file do."""
    Image.new("RGB", (90, 90)).save(own_tree / "train/cat/0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 50)
    outcome = cli("--data-path", own_tree, "--output", tmp_path / "run")
    assert outcome.status == 0 and f"{own_tree / 'train/cat/0.png'} (Image size (8100 pixels) exceeds" in outcome.out


def test_mistakes_of_the_program_keep_their_traceback(tiny_cfg, monkeypatch, tmp_path):
    def bug(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(main_module, "train", bug)
    with pytest.raises(KeyError, match="a bug"):
        main_module.main(["--cfg", str(tiny_cfg), "--output", str(tmp_path / "out")])
