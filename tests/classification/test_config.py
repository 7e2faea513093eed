"""Configuration: inheritance, overrides, errors; and the published configs."""

from pathlib import Path

import pytest
import yaml

from ssm_train.common.errors import UserError
from ssm_train.config.defaults import default_config
from ssm_train.config.load import FLAG_KEYS, load_config, model_differences, parse_config


def write(path: Path, content: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_base_files_are_relative_and_overridden(tmp_path):
    write(tmp_path / "a.yaml", {"TRAIN": {"EPOCHS": 7, "WARMUP_EPOCHS": 1}, "SEED": 3})
    write(tmp_path / "b.yaml", {"SEED": 4, "MODEL": {"KWARGS": {"x": 1, "y": 2}}})
    path = write(
        tmp_path / "sub" / "c.yaml",
        {"BASE": ["../a.yaml", "../b.yaml"], "TRAIN": {"WARMUP_EPOCHS": 2}, "MODEL": {"KWARGS": {"y": 3}}},
    )
    cfg = load_config(path)
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS, cfg.SEED) == (7, 2, 4)
    assert dict(cfg.MODEL.KWARGS) == {"x": 1, "y": 3}
    assert cfg.TRAIN.BASE_LR == default_config().TRAIN.BASE_LR


def test_base_cycle_is_an_error(tmp_path):
    write(tmp_path / "a.yaml", {"BASE": "b.yaml"})
    path = write(tmp_path / "b.yaml", {"BASE": "a.yaml"})
    with pytest.raises(UserError, match="BASE leads back"):
        load_config(path)


def test_flags_apply_zero_false_and_empty(tmp_path):
    path = write(tmp_path / "a.yaml", {"TAG": "old", "TRAIN": {"USE_CHECKPOINT": True}, "OUTPUT": "runs"})
    cfg = load_config(path, [], {"tag": "", "use_checkpoint": False, "output": None})
    assert (cfg.TAG, cfg.TRAIN.USE_CHECKPOINT, cfg.OUTPUT) == ("", False, "runs")
    # later wins: file < opts < flags
    cfg = load_config(path, ["DATA.BATCH_SIZE", "8", "SEED", "5"], {"batch_size": 16})
    assert (cfg.DATA.BATCH_SIZE, cfg.SEED) == (16, 5)


def test_every_flag_has_a_key():
    cfg = default_config()
    for key in FLAG_KEYS.values():
        node = cfg
        for part in key.split("."):
            node = node[part]


def test_opts_decode_by_the_type_of_the_default(tmp_path):
    path = write(tmp_path / "a.yaml", {})
    opts = "TRAIN.CLIP_GRAD 0 TRAIN.BASE_LR 1e-3 TAG 007 AUG.AUTO_AUGMENT None TRAIN.USE_CHECKPOINT true"
    opts += " AUG.CUTMIX_MINMAX (0.2,0.8) MODEL.KWARGS.depths [1,2] MODEL.KWARGS.norm ln MODEL.KWARGS.flag False"
    cfg = load_config(path, opts.split())
    assert (cfg.TRAIN.CLIP_GRAD, cfg.TRAIN.BASE_LR, cfg.TAG) == (0.0, 1e-3, "007")
    assert type(cfg.TRAIN.CLIP_GRAD) is float and cfg.TRAIN.USE_CHECKPOINT is True
    assert cfg.AUG.AUTO_AUGMENT == "None" and cfg.AUG.CUTMIX_MINMAX == [0.2, 0.8]
    assert dict(cfg.MODEL.KWARGS) == {"depths": [1, 2], "norm": "ln", "flag": False}
    assert parse_config(cfg.dump()) == cfg


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        ("TRAIN.BASE_LRR 1", ["'TRAIN.BASE_LRR' does not exist", "TRAIN.BASE_LR"]),
        ("TRAIN.EPOCHS.X 1", ["'TRAIN.EPOCHS.X' does not exist"]),
        ("TRAIN 1", ["TRAIN is a section"]),
        ("TRAIN.EPOCHS ten", ["TRAIN.EPOCHS must be of type int", "'ten'"]),
        ("TRAIN.EPOCHS 1.5", ["TRAIN.EPOCHS must be of type int", "1.5"]),
        ("TRAIN.USE_CHECKPOINT 1", ["TRAIN.USE_CHECKPOINT must be of type bool"]),
        ("TRAIN.EPOCHS 0", ["TRAIN.EPOCHS is 0", "at least 1"]),
        ("TRAIN.EPOCHS 20", ["TRAIN.WARMUP_EPOCHS is 20", "below TRAIN.EPOCHS"]),
        ("MODEL.NUM_CLASSES 0", ["MODEL.NUM_CLASSES is 0", "at least 1"]),
        ("MODEL.NUM_CLASSES ten", ["MODEL.NUM_CLASSES must be of type int, or None", "'ten'"]),
        ("DATA.NUM_WORKERS -1", ["DATA.NUM_WORKERS is -1", "0 or larger"]),
        ("DATA.BATCH_SIZE True", ["DATA.BATCH_SIZE must be of type int, or None", "True"]),
        ("DATA.RANGE 0", ["DATA.RANGE must be of type list"]),
        ("DATA.RANGE [5,5]", ["DATA.RANGE is [5, 5]", "two numbers [low, high] with low < high"]),
        ("DATA.RANGE 0,1,2", ["DATA.RANGE is [0, 1, 2]", "two numbers"]),
        ("MODEL.KWARGS.in_chans 4", ["MODEL.KWARGS.in_chans is 4", "1 (grey images) or 3 (RGB)"]),
        ("MODEL.KWARGS.in_chans 1 DISTILL.TEACHER vit", ["DISTILL.TEACHER is 'vit'", "teachers see RGB"]),
        ("AMP fp8", ["AMP is 'fp8'", "'bf16'"]),
        ("TRAIN.EPOCHS", ["'TRAIN.EPOCHS' has no value"]),
        ("TRAIN.EMA_DECAY 1.0", ["TRAIN.EMA_DECAY is 1.0"]),
    ],
)
def test_wrong_keys_and_values(tmp_path, opts, parts):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path / "a.yaml", {}), opts.split())
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path / "a.yaml", {"TRAIN": {"EPOCH": 1}})
    with pytest.raises(UserError, match=r"a\.yaml: config key 'TRAIN\.EPOCH' does not exist.*TRAIN\.EPOCHS"):
        load_config(path)


def test_what_may_be_open(tmp_path):
    """Given and taken back, from files and on the command line, and in a saved config."""
    path = write(tmp_path / "a.yaml", {"DATA": {"BATCH_SIZE": 8, "NUM_WORKERS": None, "RANGE": [0, 4095]}})
    cfg = load_config(path, ["DATA.NUM_WORKERS", "0", "MODEL.NUM_CLASSES", "7"])
    assert (cfg.DATA.BATCH_SIZE, cfg.DATA.NUM_WORKERS, cfg.MODEL.NUM_CLASSES) == (8, 0, 7)
    again = load_config(path, ["DATA.BATCH_SIZE", "None", "DATA.RANGE", "-1.5,1"])
    assert (again.DATA.BATCH_SIZE, again.DATA.NUM_WORKERS, again.MODEL.NUM_CLASSES) == (None, None, None)
    assert again.DATA.RANGE == [-1.5, 1] and parse_config(again.dump()) == again and parse_config(cfg.dump()) == cfg


def test_model_differences(tmp_path):
    path = write(tmp_path / "a.yaml", {"MODEL": {"KWARGS": {"depths": [1]}}})
    old, new = (
        load_config(path, ["MODEL.NUM_CLASSES", "1000"]),
        load_config(path, ["MODEL.KWARGS.depths", "[2]", "MODEL.NUM_CLASSES", "5", "SEED", "1"]),
    )
    assert model_differences(old, new) == ["MODEL.NUM_CLASSES: 1000 -> 5", "MODEL.KWARGS.depths: [1] -> [2]"]
    assert model_differences(old, old) == []
    # a number that is not given will be that of the checkpoint
    assert model_differences(old, load_config(path)) == []


def test_defaults_are_the_published_recipe():
    cfg = default_config()
    rates = {"BASE_LR": 5e-4, "WARMUP_LR": 5e-7, "MIN_LR": 5e-6, "EPOCHS": 300, "WARMUP_EPOCHS": 20}
    rest = {"WEIGHT_DECAY": 0.05, "BETAS": [0.9, 0.999], "EPS": 1e-8, "CLIP_GRAD": 5.0, "EMA_DECAY": 0.9999}
    assert {key: cfg.TRAIN[key] for key in {**rates, **rest}} == {**rates, **rest}
    aug = {"COLOR_JITTER": 0.4, "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1", "REPROB": 0.25, "REMODE": "pixel", "RECOUNT": 1}
    mix = {"MIXUP": 0.8, "CUTMIX": 1.0, "MIXUP_PROB": 1.0, "MIXUP_SWITCH_PROB": 0.5, "MIXUP_MODE": "batch"}
    assert {key: cfg.AUG[key] for key in {**aug, **mix}} == {**aug, **mix}
    assert (cfg.MODEL.LABEL_SMOOTHING, cfg.DATA.IMG_SIZE, cfg.DATA.INTERPOLATION) == (0.1, 224, "bicubic")


@pytest.mark.parametrize(
    "opts, wanted",
    [
        ("TRAIN.LOSS bce", "MODEL.LABEL_SMOOTHING is 0.1, but it must be 0 with TRAIN.LOSS bce"),
        ("TRAIN.COSUB True", "TRAIN.COSUB is True, but it must be False unless TRAIN.LOSS is bce"),
        ("TRAIN.MESA 1.0 TRAIN.EMA_DECAY 0", "TRAIN.MESA is 1.0, but it must be 0 without TRAIN.EMA_DECAY"),
        ("TRAIN.SCHEDULER.NAME poly", "TRAIN.SCHEDULER.NAME is 'poly', but it must be one of 'cosine', 'linear'"),
        (
            "TRAIN.SCHEDULER.MULTISTEPS [30,10]",
            "TRAIN.SCHEDULER.MULTISTEPS is [30, 10], but it must be epochs in",
        ),
        ("DATA.MAX_BAD_SHARE 1.5", "DATA.MAX_BAD_SHARE is 1.5, but it must be between 0 and 1"),
        ("DATA.REPEATS 0", "DATA.REPEATS is 0, but it must be at least 1"),
        ("PARALLEL dp", "PARALLEL is 'dp', but it must be one of 'ddp', 'fsdp'"),
    ],
)
def test_values_that_make_no_sense(tmp_path, opts, wanted):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path / "a.yaml", {}), opts.split())
    assert wanted in str(caught.value)
