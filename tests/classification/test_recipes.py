"""Every recipe of configs/classification: the published numbers, the right network, and the scripts that start them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch import nn

import ssm_models
from ssm_models.upstream.vmamba_variants import FURTHER_VARIANTS
from ssm_train.cli import parse_args
from ssm_train.config.load import FLAG_KEYS, load_config
from ssm_train.settle import recipe_batch
from ssm_train.step.model import build_model
from ssm_train.step.schedule import build_schedule, resolve_rates

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "classification"
SCRIPTS = ROOT / "classification" / "scripts"

# what all published trainings share; rates are those of an update of `batch` images on each of 8 processes
COMMON = {
    "classes": None, "size": 224, "interpolation": "bicubic", "crop_ratio": 0.875,
    "optimizer": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "decay_ssm": False, "layer_decay": 1.0,
    "schedule": "cosine", "loss": "ce", "smoothing": 0.1, "accumulation": 1,
    "augment": ("rand-m9-mstd0.5-inc1", 0.5, 0.25, "pixel", 1), "mixing": (0.8, 1.0, None, 1.0, 0.5, "batch"),
    "crop": "random_resized", "three_augment": False, "cosub": False, "teacher": "",
}  # fmt: skip
VMAMBA = COMMON | {
    "batch": 128, "rates": (1e-3, 1e-6, 1e-5), "per": "update", "prefix": True, "epochs": 300, "warmup_epochs": 20,
    "weight_decay": 0.05, "clip": 5.0, "ema": 0.9999, "jitter": 0.4, "repeats": 1, "mesa": 0.0, "amp": "auto",
}  # fmt: skip
VSSD_LARGE = VMAMBA | {"rates": (6e-4, 1e-6, 6e-6)}
VIM = COMMON | {
    "batch": 128, "rates": (1e-3, 1e-6, 1e-5), "per": "epoch", "prefix": False, "epochs": 300, "warmup_epochs": 5,
    "weight_decay": 0.1, "clip": 0.0, "ema": 0.99996, "jitter": 0.3, "repeats": 3, "mesa": 0.0, "amp": "off",
}  # fmt: skip
VIM_SMALL = VIM | {"batch": 64, "weight_decay": 0.05}
VIM_FINE = VIM | {"rates": (1e-5, 1e-5, 1e-5), "epochs": 30, "weight_decay": 1e-8}

# file -> recipe, model, parameters, drop path
PUBLISHED = {
    "vmamba/vanilla_vmamba_tiny": (VMAMBA, "vanilla_vmamba_tiny", 22_893_448, 0.2),
    "vmamba/vanilla_vmamba_small": (VMAMBA, "vanilla_vmamba_small", 44_417_416, 0.3),
    "vmamba/vanilla_vmamba_base": (VMAMBA, "vanilla_vmamba_base", 76_254_056, 0.6),
    "vmamba/vmamba_tiny_0220": (VMAMBA, "vmamba_tiny_0220", 32_484_904, 0.2),
    "vmamba/vmamba_tiny_s2l5": (VMAMBA, "vmamba_tiny_s2l5", 30_705_832, 0.2),
    "vmamba/vmamba_small_s2l15": (VMAMBA, "vmamba_small_s2l15", 50_147_752, 0.3),
    "vmamba/vmamba_base_s2l15": (VMAMBA, "vmamba_base_s2l15", 88_557_800, 0.6),
    "vmamba/vmamba_tiny_s1l8": (VMAMBA, "vmamba_tiny_s1l8", 30_249_064, 0.2),
    "vmamba/vmamba_small_s1l20": (VMAMBA, "vmamba_small_s1l20", 49_012_840, 0.3),
    "vmamba/vmamba_base_s1l20": (VMAMBA, "vmamba_base_s1l20", 86_614_504, 0.5),
    "vmamba/vmamba_tiny_m2": (VMAMBA, "vmamba_tiny_m2", 25_340_296, 0.2),
    "vmamba/vmamba_small_m2": (VMAMBA, "vmamba_small_m2", 39_079_816, 0.3),
    "vmamba/vmamba_base_m2": (VMAMBA, "vmamba_base_m2", 67_527_528, 0.3),
    "vssd/vssd_micro": (VMAMBA, "vssd_micro", 13_512_964, 0.1),
    "vssd/vssd_micro_droppath02": (VMAMBA, "vssd_micro", 13_512_964, 0.2),
    "vssd/vssd_tiny": (VMAMBA, "vssd_tiny", 24_270_724, 0.2),
    "vssd/vssd_small": (VSSD_LARGE, "vssd_small", 40_075_650, 0.4),
    "vssd/vssd_base": (VSSD_LARGE, "vssd_base", 88_823_151, 0.6),
    "vssd/vssd_micro_mesa": (VMAMBA | {"mesa": 1.0}, "vssd_micro", 13_512_964, 0.1),
    "vssd/vssd_tiny_mesa": (VMAMBA | {"mesa": 1.0}, "vssd_tiny", 24_270_724, 0.2),
    "vssd/vssd_small_mesa": (VSSD_LARGE | {"mesa": 1.5}, "vssd_small", 40_075_650, 0.4),
    "vssd/vssd_base_mesa": (VSSD_LARGE | {"mesa": 2.0}, "vssd_base", 88_823_151, 0.6),
    "vssd/vssd_tiny_iccv2025": (VMAMBA, "vssd_tiny_iccv2025", 28_192_936, 0.2),
    "vssd/vssd_small_iccv2025": (VSSD_LARGE, "vssd_small_iccv2025", 50_417_512, 0.4),
    "vssd/vssd_tiny_iccv2025_mesa": (VMAMBA | {"mesa": 1.0}, "vssd_tiny_iccv2025", 28_192_936, 0.2),
    "vssd/vssd_small_iccv2025_mesa": (VSSD_LARGE | {"mesa": 1.5}, "vssd_small_iccv2025", 50_417_512, 0.4),
    "vim/vim_tiny_patch16_224": (VIM, "vim_tiny_patch16_224", 7_148_008, 0.0),
    "vim/vim_small_patch16_224": (VIM_SMALL, "vim_small_patch16_224", 25_796_584, 0.05),
    "vim/vim_base_patch16_224": (VIM_SMALL, "vim_base_patch16_224", 97_598_440, 0.05),
    "vim/vim_tiny_patch16_stride8_224": (VIM_FINE, "vim_tiny_patch16_stride8_224", 7_250_344, 0.0),
    "vim/vim_small_patch16_stride8_224": (VIM_FINE, "vim_small_patch16_stride8_224", 26_001_256, 0.0),
}
# file -> model, weight of MESA
DIGITS = {
    "vmamba/vmamba_nano_digits": ("vmamba_nano", 0.0),
    "vim/vim_nano_digits": ("vim_nano", 0.0),
    "vssd/vssd_nano_digits": ("vssd_nano", 0.0),
    "vssd/vssd_nano_digits_mesa": ("vssd_nano", 1.0),
    "vssd/vssd_nano_iccv2025_digits": ("vssd_nano_iccv2025", 0.0),
}
ABLATIONS = [name for name in FURTHER_VARIANTS if name.startswith("vmambav")]


def load(name: str, *opts: str):
    return load_config(str(CONFIGS / f"{name}.yaml"), list(opts))


def on_meta(cfg) -> nn.Module:
    with torch.device("meta"):
        return build_model(cfg)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def recipe(cfg, processes: int = 8) -> dict:
    """The numbers of a config that a publication would give."""
    train, aug = cfg.TRAIN, cfg.AUG
    # on a machine whose memory holds it
    batch = cfg.DATA.BATCH_SIZE or recipe_batch(processes, None)
    rates = resolve_rates(train, batch * processes * train.ACCUMULATION_STEPS)
    return {
        "classes": cfg.MODEL.NUM_CLASSES,
        "size": cfg.DATA.IMG_SIZE,
        "interpolation": cfg.DATA.INTERPOLATION,
        "crop_ratio": cfg.DATA.CROP_RATIO,
        "optimizer": train.OPTIMIZER,
        "betas": train.BETAS,
        "eps": train.EPS,
        "decay_ssm": train.DECAY_SSM,
        "layer_decay": train.LAYER_DECAY,
        "schedule": train.SCHEDULER.NAME,
        "loss": train.LOSS,
        "smoothing": cfg.MODEL.LABEL_SMOOTHING,
        "accumulation": train.ACCUMULATION_STEPS,
        "augment": (aug.AUTO_AUGMENT, aug.HFLIP, aug.REPROB, aug.REMODE, aug.RECOUNT),
        "mixing": (
            aug.MIXUP,
            aug.CUTMIX,
            aug.CUTMIX_MINMAX,
            aug.MIXUP_PROB,
            aug.MIXUP_SWITCH_PROB,
            aug.MIXUP_MODE,
        ),
        "crop": aug.CROP,
        "three_augment": aug.THREE_AUGMENT,
        "cosub": train.COSUB,
        "teacher": cfg.DISTILL.TEACHER,
        "batch": batch,
        "rates": tuple(float(f"{rate:.12g}") for rate in (rates.base, rates.warmup, rates.minimum)),
        "per": train.SCHEDULER.PER,
        "prefix": train.SCHEDULER.WARMUP_PREFIX,
        "epochs": train.EPOCHS,
        "warmup_epochs": train.WARMUP_EPOCHS,
        "weight_decay": train.WEIGHT_DECAY,
        "clip": train.CLIP_GRAD,
        "ema": train.EMA_DECAY,
        "jitter": aug.COLOR_JITTER,
        "repeats": cfg.DATA.REPEATS,
        "mesa": train.MESA,
        "amp": cfg.AMP,
    }


def test_all_recipes_are_known():
    found = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")}
    finetuning = {f"finetune_{family}" for family in ("vmamba", "vim", "vssd")}  # test_finetune.py
    assert found == {*PUBLISHED, *DIGITS, *finetuning, *(f"vmamba/ablations/{name}" for name in ABLATIONS)}
    assert len(ABLATIONS) == 33


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe(name):
    numbers, model, parameters, drop_path = PUBLISHED[name]
    cfg = load(name)
    assert recipe(cfg) == numbers
    assert (cfg.MODEL.NAME, cfg.MODEL.DROP_PATH_RATE, dict(cfg.MODEL.KWARGS)) == (model, drop_path, {})
    network = on_meta(cfg)
    assert count(network) == parameters
    assert max(module.drop_prob for module in network.modules() if isinstance(module, DropPath)) == drop_path
    if numbers["mesa"]:
        assert cfg.TRAIN.MESA_START == 0.25


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation(name):
    cfg = load(f"vmamba/ablations/{name}")
    assert recipe(cfg) == VMAMBA and cfg.MODEL.DROP_PATH_RATE == 0.2
    model = on_meta(cfg)
    with torch.device("meta"):
        upstream = ssm_models.from_upstream("vmamba", name)
    shapes, expected = (
        {key: value.shape for key, value in network.state_dict().items()} for network in (model, upstream)
    )
    assert shapes == expected and count(model) == count(upstream)
    # what the shapes do not show: the mixers, their activation and layout
    assert [str(module) for module in model.children()] == [str(module) for module in upstream.children()]
    kinds = {"forward_type", "ssm_init"} & set(cfg.MODEL.KWARGS)
    assert {kind: cfg.MODEL.KWARGS[kind] for kind in kinds} == {kind: FURTHER_VARIANTS[name][kind] for kind in kinds}


@pytest.mark.parametrize("name", DIGITS)
def test_digits(name):
    cfg = load(name)
    assert DIGITS[name] == (cfg.MODEL.NAME, cfg.TRAIN.MESA)
    assert (cfg.MODEL.NUM_CLASSES, cfg.DATA.IMG_SIZE, cfg.AUG.HFLIP, cfg.AMP) == (None, 32, 0.0, "off")
    assert on_meta(cfg)(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)


# ---- schedules ----


def rates_per_epoch(name: str) -> list[float]:
    """Of 8 processes, in the first update of every epoch, with 5 updates in each."""
    train = load(name).TRAIN
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = resolve_rates(train, 8 * (load(name).DATA.BATCH_SIZE or recipe_batch(8, None)))
    optimizer.param_groups[0]["lr"] = rates.base
    schedule = build_schedule(optimizer, train, rates, 5)
    curve = []
    for epoch in range(train.EPOCHS):
        schedule.set(5 * epoch)
        curve.append(optimizer.param_groups[0]["lr"])
        schedule.set(5 * epoch + 4)
        assert (optimizer.param_groups[0]["lr"] == curve[-1]) == (train.SCHEDULER.PER == "epoch")
    return curve


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vim_small_patch16_224"])
def test_rates_of_vim(name):
    """Per epoch: five of warm-up from 1e-6, then the cosine where it has come to by then, towards 1e-5."""
    for epoch, rate in enumerate(rates_per_epoch(f"vim/{name}")):
        warm = 1e-6 + epoch * (1e-3 - 1e-6) / 5
        cosine = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
        assert rate == pytest.approx(warm if epoch < 5 else cosine, rel=1e-12)


def test_rate_of_vim_fine_tuning_is_constant():
    assert rates_per_epoch("vim/vim_tiny_patch16_stride8_224") == pytest.approx([1e-5] * 30, rel=1e-12)


@pytest.mark.parametrize(("name", "peak", "low"), [("vssd_tiny", 1e-3, 1e-5), ("vssd_base", 6e-4, 6e-6)])
def test_rates_of_vssd(name, peak, low):
    """Per update, the cosine begins after the warm-up, and all three rates follow the batch."""
    for epoch, rate in enumerate(rates_per_epoch(f"vssd/{name}")):
        warm = 1e-6 + epoch * (peak - 1e-6) / 20
        cosine = low + (peak - low) * (1 + math.cos(math.pi * (epoch - 20) / 280)) / 2
        assert rate == pytest.approx(warm if epoch < 20 else cosine, rel=1e-12)


# ---- scripts ----

STARTED = {
    "pt-vim-t.sh": "vim/vim_tiny_patch16_224",
    "pt-vim-s.sh": "vim/vim_small_patch16_224",
    "ft-vim-t.sh": "vim/vim_tiny_patch16_stride8_224",
    "ft-vim-s.sh": "vim/vim_small_patch16_stride8_224",
}


@pytest.fixture
def start(tmp_path):
    """start(script, *options, **environment): run it in a folder with `images` and `weights.pth`, and with a torchrun
    that prints where it is and its arguments, a line each."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    fake.chmod(0o755)
    python = tmp_path / "bin" / "python"  # of the environment, beside it
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "images").mkdir()
    (tmp_path / "weights.pth").touch()

    def run(script: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if name not in ("DATA_PATH", "GPUS", "PRETRAINED")}
        environment = clean | {"PATH": f"{fake.parent}:{os.environ['PATH']}"} | environment
        command = [str(SCRIPTS / script), *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("script", STARTED)
def test_script_starts_the_recipe(script, start, tmp_path):
    fine = script.startswith("ft")
    done = start(script, DATA_PATH="images", **({"PRETRAINED": "weights.pth"} if fine else {}))
    assert done.returncode == 0, done.stderr
    folder, *launcher, program = done.stdout.split("classification/main.py")[0].split("\n")
    count = max(torch.cuda.device_count(), 1)
    assert (folder, launcher, program) == (str(ROOT), ["--standalone", f"--nproc_per_node={count}"], "")
    assert f"GPUS is not set: {count} process(es)" in done.stderr
    args = parse_args(done.stdout.splitlines()[4:])
    assert args.data_path == str(tmp_path / "images")
    assert args.pretrained == (str(tmp_path / "weights.pth") if fine else None)
    assert (args.output, args.tag, args.resume) == ("output", STARTED[script].split("/")[1], "auto")
    cfg = load_config(str(ROOT / args.cfg), args.opts, {flag: getattr(args, flag) for flag in FLAG_KEYS})
    numbers, model, _, drop_path = PUBLISHED[STARTED[script]]
    assert recipe(cfg) == numbers
    assert (model, drop_path) == (cfg.MODEL.NAME, cfg.MODEL.DROP_PATH_RATE)


def test_script_passes_options_on(start, tmp_path):
    options = ("--accumulation-steps", "4", "--output", "else where", "--opts", "TAG", "x")
    done = start("pt-vim-t.sh", *options, DATA_PATH=str(tmp_path / "images"), GPUS="2")
    assert "--nproc_per_node=2" in done.stdout.splitlines()
    args = parse_args(done.stdout.splitlines()[4:])
    assert (args.accumulation_steps, args.output, args.opts) == (4, "else where", ["TAG", "x"])


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("pt-vim-t.sh", {}, "DATA_PATH is not set"),
        ("pt-vim-s.sh", {"DATA_PATH": "nowhere"}, "DATA_PATH 'nowhere' does not exist"),
        ("pt-vim-s.sh", {"DATA_PATH": "images", "GPUS": "0"}, "GPUS is '0'"),
        ("pt-vim-s.sh", {"DATA_PATH": "images", "GPUS": "two"}, "GPUS is 'two'"),
        ("ft-vim-t.sh", {"DATA_PATH": "images"}, "PRETRAINED is not set"),
        ("ft-vim-s.sh", {"DATA_PATH": "images", "PRETRAINED": "none.pth"}, "PRETRAINED 'none.pth' does not exist"),
        ("train.sh", {"DATA_PATH": "images"}, "no recipe given"),
    ],
)
def test_script_says_what_is_missing(script, environment, message, start):
    done = start(script, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_script_takes_published_names(start):
    done = start("ft-vim-t.sh", DATA_PATH="images", PRETRAINED="vim_tiny_patch16_224.in1k", GPUS="1")
    assert parse_args(done.stdout.splitlines()[4:]).pretrained == "vim_tiny_patch16_224.in1k"


def test_script_with_another_recipe(start):
    done = start("train.sh", "vmamba/vmamba_tiny_s1l8.yaml", DATA_PATH="images")
    assert parse_args(done.stdout.splitlines()[4:]).tag == "vmamba_tiny_s1l8"
    done = start("train.sh", "vmamba/none.yaml", DATA_PATH="images")
    assert done.returncode == 2 and "configs/classification/vmamba/none.yaml does not exist" in done.stderr
