"""The table of published weights: its form, and what reads it."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ssm_models import CheckpointError, from_upstream, read_checkpoint
from ssm_models.weights import entries, find, resolve
from ssm_models.weights.table import TASKS, of_model
from ssm_train.config.load import load_config

ROOT = Path(__file__).parents[3]
ROWS = list(entries().values())
HOSTS = {"github.com", "huggingface.co", "drive.google.com"}
METRICS = {
    "classification": {"top1", "top5"},
    "detection": {"box_ap", "mask_ap"},
    "segmentation": {"miou", "miou_tta"},
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_the_form(row):
    for url in (row.url, *row.mirrors):
        parts = urlsplit(url)
        assert parts.scheme == "https" and parts.hostname in HOSTS and not parts.fragment and not parts.query
        assert re.fullmatch(r"[\x21-\x7e]+", url) and "#" not in url
    assert row.filename.endswith(".pth") and "%" not in row.filename
    assert row.task in TASKS and row.entry in ("model", "ema")
    assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)
    assert row.bytes is None or row.bytes > 10**8
    assert row.metrics and set(row.metrics) <= METRICS[row.task]
    assert all(30 < value < 100 for value in row.metrics.values())
    assert row.source.startswith("https://github.com/") and row.licence in ("MIT", "Apache-2.0", None)


def test_every_row_belongs_to_a_model_or_config():
    for row in ROWS:
        if row.task == "classification":
            assert row.tag.endswith("in1k")
            if row.model:
                assert timm.is_model(row.model) and row.name == f"{row.model}.{row.tag}"
        else:
            found = list((ROOT / "configs" / row.task).rglob(f"{row.model}.py"))
            assert len(found) == 1, row.model


def test_addresses_are_unique():
    urls = [url for row in ROWS for url in (row.url, *row.mirrors)]
    assert len(set(urls)) == len(urls)


def test_published_numbers():
    """A few rows, written down again from the authors' tables."""
    assert len(ROWS) == 55
    expected = {
        "vanilla_vmamba_base.dp05_in1k": ({"top1": 83.2}, "vssmbase_dp05_ckpt_epoch_260.pth"),
        "vmamba_tiny_s1l8.in1k": ({"top1": 82.6}, "vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vim_small_patch16_stride8_224.ft_in1k": ({"top1": 81.6, "top5": 95.4}, "vim_s_midclstok_ft_81p6acc.pth"),
        "vssd_base.mesa_in1k": ({"top1": 85.4}, "vssd_base_e300_with_mesa.pth"),
        "vssd_tiny_iccv2025.mesa_in1k": ({"top1": 83.8}, "vssd_tiny_mesa.pth"),
        "vssd_small_iccv2025.mesa_in1k": ({"top1": 84.6}, "vssd_small_mesa.pth"),
        "mask-rcnn_vmamba-base-s2l15_fpn_1x_coco.bs8": (
            {"box_ap": 49.2, "mask_ap": 43.9},
            "mask_rcnn_vssm_fpn_coco_base_epoch_12_bs8.pth",
        ),
        "upernet_vanilla-vmamba-small_160k_ade20k-640x640": (
            {"miou": 50.8, "miou_tta": 50.8},
            "vssmsmall_upernet_4xb4-160k_ade20k-640x640_iter_112000.pth",
        ),
    }
    for name, (metrics, file) in expected.items():
        assert dict(find(name).metrics) == metrics and find(name).filename == file
    # the published accuracies of VSSD are those of its averaged weights
    assert {row.entry for row in ROWS if row.model.startswith("vssd_")} == {"ema"}
    assert {row.entry for row in ROWS if not row.model.startswith("vssd_")} == {"model"}


def test_tags_of_a_model():
    assert list(of_model("vssd_tiny")) == ["in1k", "mesa_in1k"]
    assert find("vssd_tiny").name == "vssd_tiny.in1k"
    assert of_model("vmamba_tiny_m2") == {}
    assert timm.list_pretrained("vssd_tiny*") == [
        *("vssd_tiny.in1k", "vssd_tiny.mesa_in1k", "vssd_tiny_iccv2025.mesa_in1k")
    ]
    assert [row.name for row in ROWS if not row.model] == ["vim_tiny_73p1.in1k"]
    classifiers = {row.name for row in ROWS if row.task == "classification" and row.model}
    listed = {name for family in ("vssm", "vim", "vssd") for name in timm.list_models(module=family, pretrained=True)}
    assert listed == classifiers
    assert timm.get_pretrained_cfg("vssd_tiny.mesa_in1k").url.endswith("/vssd_tiny_e300_with_mesa.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vssd_tinny.in1k", "^vssd_tinny.in1k is neither .* did you mean vssd_tiny.in1k or "),
        ("vmamba_tiny_m2", "^vmamba_tiny_m2 is neither a file nor the name of published weights; did you mean"),
        ("qqq", "`python -m ssm_models` lists what is"),
    ],
)
def test_what_is_neither_a_file_nor_a_name(name, message):
    with pytest.raises(CheckpointError, match=message):
        resolve(name)


def test_what_looks_like_a_path_is_one():
    for path in ("no/such", "vssd_tiny.pth"):
        assert resolve(path) == (Path(path), "auto", None)
        with pytest.raises(CheckpointError, match=f"^{path} is not a file$"):
            read_checkpoint(path)


def test_models_without_weights_say_so():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vmamba_tiny_m2"):
        timm.create_model("vmamba_tiny_m2", pretrained=True)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_from_upstream_knows_every_file(row):
    """By the name of the file, also with a folder before it; detectors' and segmentors' give their backbone."""
    family = next(f for f in ("vmamba", "vim", "vssd") if f in row.name)
    with torch.device("meta"):
        if not row.model:
            model = from_upstream(family, row.filename)
            # the four sets of a file of 16 bytes per parameter, and the rotations in two of them
            tables = 2 * sum(buffer.nbytes for buffer in model.buffers())
            size = 16 * sum(p.numel() for p in model.parameters()) + tables
            assert model.rope_residual and 0 < row.bytes - size < 700_000
            return
        for name in (row.filename, f"/some/{row.filename}", row.filename[:-4]):
            found = from_upstream(family, name)
            expected = timm.create_model(row.backbone)
            assert {n: p.shape for n, p in found.state_dict().items()} == {
                n: p.shape for n, p in expected.state_dict().items()
            }


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.task == "classification" and row.model], ids=lambda r: r.name
)
def test_classifiers_are_evaluated_as_published(row):
    """Shorter side to 256, bicubic, the centre 224 x 224, ImageNet's mean and deviation, as docs/weights.md says."""
    cfg = timm.get_pretrained_cfg(row.name)
    assert cfg.input_size == (3, 224, 224) and cfg.crop_pct * 256 == 224 and cfg.interpolation == "bicubic"
    assert (cfg.mean, cfg.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    [path] = ROOT.glob(f"configs/classification/*/{row.recipe}.yaml")
    data = load_config(str(path)).DATA
    assert (data.IMG_SIZE, data.CROP_RATIO, data.INTERPOLATION) == (224, 0.875, "bicubic")
