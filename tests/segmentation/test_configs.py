"""Every segmentation config builds, costs what its paper says, and trains with the published numbers."""

import pytest

pytest.importorskip("mmseg")

import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from segmentation.tools.get_flops import main
from ssm_mm.flops import dense_card
from tests.dense_configs import Configs, families, model_of

pytestmark = [pytest.mark.dense, pytest.mark.usefixtures("fast_mmengine")]

OURS = Configs("segmentation", (512, 2048))
CONFIGS, config, card = OURS.paths, OURS.config, OURS.card

# millions of parameters and billions of MACs at 2048x512, as printed in the tables; drop path
PUBLISHED = {
    "vanilla-vmamba-tiny": ("54.55", "964", 0.3),
    "vanilla-vmamba-small": ("76.07", "1081", 0.3),
    "vanilla-vmamba-base": ("109.77", "1226", 0.3),
    "vmamba-tiny-s2l5": ("62.36", "947.78", 0.2),
    "vmamba-tiny-s1l8": ("61.90", "948.78", 0.2),
    "vmamba-small-s2l15": ("81.80", "1028.40", 0.3),
    "vmamba-base-s2l15": ("122.07", "1170.34", 0.6),
    "vssd-micro": ("42", "893", 0.1),
    "vssd-tiny": ("53", "941", 0.2),
    "vssd-small": (None, None, 0.4),
    "vssd-base": (None, None, 0.6),
    "vssd-tiny-iccv2025": (None, None, 0.2),
    "vssd-small-iccv2025": ("81.147", "1021", 0.4),
    "vim-tiny": (None, None, 0.1),
    "vim-small": (None, None, 0.1),
    "vim-base": (None, None, 0.1),
}


def crop_of(stem: str) -> int:
    return int(stem.rsplit("x", 1)[1])


def test_every_published_row_has_its_config():
    schedule = {name: "60k" if name.startswith("vim") else "160k" for name in PUBLISHED}
    expected = {f"upernet_{name}_{schedule[name]}_ade20k-512x512" for name in PUBLISHED}
    for name in ("vanilla-vmamba-small", "vmamba-small-s2l15"):
        expected |= {f"upernet_{name}_160k_ade20k-{crop}x{crop}" for crop in (640, 896)}
    assert set(CONFIGS) == expected


@pytest.mark.parametrize("name", families(PUBLISHED))
def test_parameters_and_macs_are_the_published(name):
    parameters, macs, _ = PUBLISHED[name]
    backbone, decode, auxiliary = card(name).parts
    assert (backbone.name, decode.name, auxiliary.name) == ("backbone", "decode_head", "auxiliary_head")
    assert backbone.macs > 0 and decode.macs > 0 and auxiliary.macs == 0
    row = OURS.row_of(name)
    assert f"| {card(name).parameters / 1e6:.2f} M" in row and f"| {card(name).macs / 1e9:.1f} G" in row
    if parameters:
        # VMamba's table has the auxiliary head among the parameters, VSSD's has not
        counted = card(name).parameters - (auxiliary.parameters if name.startswith("vssd") else 0)
        assert counted / 1e6 == pytest.approx(float(parameters), rel=0.01)
        assert card(name).macs / 1e9 == pytest.approx(float(macs), rel=0.01)


def test_macs_of_640_pixels():
    counted = dense_card(config("upernet_vmamba-small-s2l15_160k_ade20k-640x640"), (640, 2560))
    assert counted.macs / 1e9 == pytest.approx(1606.87, rel=1e-3)
    assert counted.parameters == card("vmamba-small-s2l15").parameters


def test_vim_tiny_has_the_parameters_of_the_published_log():
    # which is of a position embedding for 1024 pixels (64x64 rows, not 32x32), and of a last norm that no map needs
    assert card("vim-tiny").parameters == 12_901_100 - (64 * 64 - 32 * 32) * 192 - 192


@pytest.mark.parametrize("stem", CONFIGS)
def test_backbone_is_named_with_its_own_drop_path_and_no_weights(stem):
    OURS.check_backbone(stem, PUBLISHED[model_of(stem)][2])
    model = config(stem).model
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 150
    assert model.auxiliary_head.in_channels == model.decode_head.in_channels[2]


@pytest.mark.parametrize("stem", [stem for stem in CONFIGS if "_160k_" in stem])
def test_schedules_of_160k(stem):
    cfg = config(stem)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160000, 16000)
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
    assert (poly.type, poly.power, poly.begin, poly.end, poly.eta_min) == ("PolyLR", 1.0, 1500, 160000, 0.0)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 6e-5, 0.01)
    assert cfg.train_dataloader.batch_size == (4 if crop_of(stem) == 896 else 2)
    assert cfg.model.test_cfg.mode == "whole"


@pytest.mark.parametrize("stem", CONFIGS)
def test_images_of_all_pipelines_have_the_size_in_the_name(stem):
    cfg, crop = config(stem), crop_of(stem)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert tuple(cfg.model.data_preprocessor.size) == steps["RandomCrop"].crop_size == (crop, crop)
    assert steps["RandomCrop"].cat_max_ratio == 0.75
    assert (steps["RandomResize"].scale, steps["RandomResize"].ratio_range) == ((4 * crop, crop), (0.5, 2.0))
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        [resize] = [step for step in loader.dataset.pipeline if step.type == "Resize"]
        assert resize.scale == (4 * crop, crop) and resize.keep_ratio and loader.batch_size == 1


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_vim_trains_as_published(size):
    cfg = config(f"upernet_vim-{size}_60k_ade20k-512x512")
    width = {"tiny": 192, "small": 384, "base": 768}[size]
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (60000, 1000)
    assert cfg.default_hooks.checkpoint.interval == 1000
    assert [scheduler.end for scheduler in cfg.param_scheduler] == [1500, 60000]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-4, 0.05)
    assert cfg.optim_wrapper.paramwise_cfg.decay_rate == (0.92 if size == "tiny" else 0.95)
    assert cfg.train_dataloader.batch_size == 8 and "find_unused_parameters" not in cfg
    assert cfg.model.test_cfg == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    assert (cfg.model.decode_head.channels, cfg.model.decode_head.in_channels) == (width, [width] * 4)
    arguments = cfg.model.backbone.model_args
    assert arguments.get("if_rope", False) == (size != "tiny")
    assert arguments.get("residual_in_fp32", True) == (size != "tiny")
    assert arguments.get("last_layer_process", "none") == ("none" if size == "tiny" else "add")


def test_rates_of_vim_fall_by_block():
    cfg = config("upernet_vim-tiny_60k_ade20k-512x512")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {names[id(group["params"][0])]: (group["lr"] / 1e-4, group["weight_decay"]) for group in groups}
    assert len(found) == len(names)
    expected = {
        "backbone.pos_embed": (25, 0.0),
        "backbone.patch_embed.proj.weight": (25, 0.05),
        "backbone.layers.0.mixer.in_proj.weight": (24, 0.05),
        "backbone.layers.23.mixer.D": (1, 0.0),
        "backbone.layers.23.mixer.A_log": (1, 0.05),
        "backbone.fpn1.0.weight": (0, 0.05),
        "backbone.fpn1.1.weight": (0, 0.0),
        "decode_head.conv_seg.weight": (0, 0.05),
        "decode_head.conv_seg.bias": (0, 0.0),
    }
    for name, (power, decay) in expected.items():
        assert found[name] == (pytest.approx(0.92**power), decay), name


def test_get_flops_prints_the_parts(capsys):
    assert main([str(CONFIGS["upernet_vssd-tiny_160k_ade20k-512x512"])]) == 0
    # before them a line tells that batch norms are not synchronised on a CPU
    head, *rows, total = capsys.readouterr().out.splitlines()[-5:]
    assert "2048x512" in head and [row.split()[0] for row in rows] == ["backbone", "decode_head", "auxiliary_head"]
    counted = card("vssd-tiny")
    assert total.split()[1:] == [f"{counted.parameters / 1e6:.3f}", "M", f"{counted.macs / 1e9:.3f}", "G"]
