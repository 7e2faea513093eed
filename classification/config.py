"""The configuration: defaults, YAML files with `BASE`, `--opts`, and the table of command-line flags.

Later wins: defaults < BASE files < the file < --opts < flags. Every key exists in `default_config`, except that
MODEL.KWARGS takes any key: it is passed to `timm.create_model` as it is.
"""

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from classification.errors import UserError

# command-line flag -> config key; a flag that was not given is None and leaves the key alone, so 0 and "" do apply
FLAG_KEYS = {
    "batch_size": "DATA.BATCH_SIZE",
    "data_path": "DATA.DATA_PATH",
    "output": "OUTPUT",
    "tag": "TAG",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "amp": "AMP",
    "device": "DEVICE",
}


def default_config() -> CN:
    """The published ImageNet-1K recipe of VMamba; a YAML names a model and what differs."""
    cfg = CN()
    cfg.DATA = CN()
    cfg.DATA.DATA_PATH = ""  # folder with train/<class>/* and val/<class>/*
    cfg.DATA.BATCH_SIZE = 128  # images per process and micro-step
    cfg.DATA.IMG_SIZE = 224
    cfg.DATA.INTERPOLATION = "bicubic"
    cfg.DATA.NUM_WORKERS = 8  # loader processes per training process; 0 loads in the training process
    cfg.DATA.MAX_BAD_IMAGES = 100  # distinct unreadable training images after which a run stops

    cfg.MODEL = CN()
    cfg.MODEL.NAME = "vmamba_tiny_s1l8"  # any name of timm's registry
    cfg.MODEL.NUM_CLASSES = 1000
    cfg.MODEL.DROP_PATH_RATE = 0.1
    cfg.MODEL.LABEL_SMOOTHING = 0.1
    cfg.MODEL.KWARGS = CN(new_allowed=True)

    cfg.TRAIN = CN()
    cfg.TRAIN.EPOCHS = 300
    cfg.TRAIN.WARMUP_EPOCHS = 20
    cfg.TRAIN.BASE_LR = 5e-4  # the three rates are for a global batch of 512, see lr_scheduler.py
    cfg.TRAIN.WARMUP_LR = 5e-7
    cfg.TRAIN.MIN_LR = 5e-6
    cfg.TRAIN.WEIGHT_DECAY = 0.05
    cfg.TRAIN.BETAS = [0.9, 0.999]
    cfg.TRAIN.EPS = 1e-8
    cfg.TRAIN.CLIP_GRAD = 5.0  # largest global gradient norm; 0 measures the norm without clipping
    cfg.TRAIN.ACCUMULATION_STEPS = 1
    cfg.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass
    cfg.TRAIN.EMA_DECAY = 0.9999  # per optimizer update; 0 keeps no average
    cfg.TRAIN.KEEP_CHECKPOINTS = 3  # newest ones, besides last, best and best_ema

    cfg.AUG = CN()
    cfg.AUG.HFLIP = 0.5
    cfg.AUG.COLOR_JITTER = 0.4  # used only without AUTO_AUGMENT, as timm does
    cfg.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # "" for none
    cfg.AUG.REPROB = 0.25
    cfg.AUG.REMODE = "pixel"
    cfg.AUG.RECOUNT = 1
    cfg.AUG.MIXUP = 0.8
    cfg.AUG.CUTMIX = 1.0
    cfg.AUG.CUTMIX_MINMAX = None
    cfg.AUG.MIXUP_PROB = 1.0
    cfg.AUG.MIXUP_SWITCH_PROB = 0.5
    cfg.AUG.MIXUP_MODE = "batch"

    cfg.AMP = "bf16"  # bf16, fp16 (with gradient scaling) or off
    cfg.DEVICE = ""  # cpu, cuda, or "" for CUDA where there is one
    cfg.OUTPUT = "output"
    cfg.TAG = ""
    cfg.SEED = 0
    cfg.PRINT_FREQ = 10  # micro-steps between two progress lines
    return cfg


def load_config(path: str, opts: list[str] | None = None, flags: dict[str, Any] | None = None) -> CN:
    """Merge file, `opts` (alternating keys and values) and `flags` (see FLAG_KEYS) into a checked, frozen config.

    Raises UserError for a missing or malformed file, an unknown key (with close matches) and a value that cannot be.
    """
    cfg = default_config()
    _merge_file(cfg, Path(path), chain=())
    opts = opts or []
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of a key and a value, but the last key {opts[-1]!r} has no value")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        _set(cfg, key, text, source="--opts")
    for flag, value in (flags or {}).items():
        if value is not None:
            _set(cfg, FLAG_KEYS[flag], value, source=f"--{flag.replace('_', '-')}")
    _check(cfg)
    cfg.freeze()
    return cfg


def parse_config(text: str) -> CN:
    """The inverse of `cfg.dump()`: the config of a checkpoint or of a run's config.yaml."""
    cfg = default_config()
    _merge_mapping(cfg, yaml.safe_load(text), prefix="", source="saved config")
    _check(cfg)
    cfg.freeze()
    return cfg


def _merge_file(cfg: CN, path: Path, chain: tuple[Path, ...]) -> None:
    path = path.resolve()
    if path in chain:
        raise UserError(f"{path}: BASE leads back to this file; remove one of the BASE entries")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}; give an existing YAML file to --cfg") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must be a mapping of keys to values, not a {type(content).__name__}")
    bases = content.pop("BASE", None) or []
    for base in [bases] if isinstance(bases, str) else bases:
        _merge_file(cfg, path.parent / str(base), chain=(*chain, path))
    _merge_mapping(cfg, content, prefix="", source=str(path))


def _merge_mapping(cfg: CN, mapping: dict[str, Any], prefix: str, source: str) -> None:
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if isinstance(_lookup(cfg, key), CN) and isinstance(value, dict):
            _merge_mapping(cfg, value, prefix=f"{key}.", source=source)
        else:
            _set(cfg, key, value, source)


def _lookup(cfg: CN, key: str) -> Any:
    """The node or value at a dotted key, None where there is none."""
    node: Any = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CN) else None
    return node


def _set(cfg: CN, key: str, value: Any, source: str) -> None:
    """Assign one key, converting text to the type of the default."""
    section, _, name = key.rpartition(".")
    node = _lookup(cfg, section) if section else cfg
    if not isinstance(node, CN) or (name not in node and not node.is_new_allowed()):
        near = difflib.get_close_matches(key.upper(), list(_keys(cfg)), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see default_config in classification/config.py"
        raise UserError(f"{source}: config key {key!r} does not exist; {hint}")
    if name in node and isinstance(node[name], CN):
        inside = ", ".join(sorted(node[name])) or "any key"
        raise UserError(f"{source}: {key} is a section, not a value; set a key in it ({inside})")
    old = node.get(name)
    node[name] = _convert(value, old, name in node, key, source)


def _keys(node: CN, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CN):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _convert(value: Any, old: Any, known: bool, key: str, source: str) -> Any:
    if isinstance(value, str) and not isinstance(old, str):
        value = _literal(value)
    if not known:
        return CN(value) if isinstance(value, dict) else value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, list) and isinstance(value, tuple):
        return list(value)
    if old is None and isinstance(value, list | tuple | None):
        return value if value is None else list(value)
    if type(value) is not type(old):
        wanted = "list" if old is None else type(old).__name__
        raise UserError(f"{source}: {key} must be of type {wanted}, not {value!r}")
    return value


def _literal(text: str) -> Any:
    """A Python literal (1, 1e-3, [1, 2], None) or YAML's true/false; any other text stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check(cfg: CN) -> None:
    """Refuse values that would fail later or silently mean something else."""

    def need(key: str, condition: bool, wanted: str) -> None:
        if not condition:
            raise UserError(f"config {key} is {_lookup(cfg, key)!r}, but it must be {wanted}")

    for key in (
        "DATA.BATCH_SIZE",
        "DATA.IMG_SIZE",
        "MODEL.NUM_CLASSES",
        "TRAIN.EPOCHS",
        "TRAIN.ACCUMULATION_STEPS",
        "TRAIN.KEEP_CHECKPOINTS",
        "AUG.RECOUNT",
        "PRINT_FREQ",
    ):
        need(key, _lookup(cfg, key) >= 1, "at least 1")
    for key in (
        "DATA.NUM_WORKERS",
        "DATA.MAX_BAD_IMAGES",
        "TRAIN.WARMUP_EPOCHS",
        "TRAIN.BASE_LR",
        "TRAIN.WARMUP_LR",
        "TRAIN.MIN_LR",
        "TRAIN.WEIGHT_DECAY",
        "TRAIN.EPS",
        "TRAIN.CLIP_GRAD",
        "AUG.COLOR_JITTER",
        "AUG.MIXUP",
        "AUG.CUTMIX",
        "SEED",
    ):
        need(key, _lookup(cfg, key) >= 0, "0 or larger")
    for key in ("MODEL.DROP_PATH_RATE", "MODEL.LABEL_SMOOTHING", "TRAIN.EMA_DECAY"):
        need(key, 0 <= _lookup(cfg, key) < 1, "at least 0 and below 1")
    for key in ("AUG.HFLIP", "AUG.REPROB", "AUG.MIXUP_PROB", "AUG.MIXUP_SWITCH_PROB"):
        need(key, 0 <= _lookup(cfg, key) <= 1, "between 0 and 1")
    for key, choices in {
        "AMP": ("bf16", "fp16", "off"),
        "DEVICE": ("", "cpu", "cuda"),
        "DATA.INTERPOLATION": ("bilinear", "bicubic"),
        "AUG.REMODE": ("const", "rand", "pixel"),
        "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    }.items():
        need(key, _lookup(cfg, key) in choices, "one of " + ", ".join(map(repr, choices)))
    need("TRAIN.WARMUP_EPOCHS", cfg.TRAIN.WARMUP_EPOCHS < cfg.TRAIN.EPOCHS, f"below TRAIN.EPOCHS, {cfg.TRAIN.EPOCHS}")
    betas, minmax = cfg.TRAIN.BETAS, cfg.AUG.CUTMIX_MINMAX
    need("TRAIN.BETAS", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    in_order = minmax is None or (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1)
    need("AUG.CUTMIX_MINMAX", in_order, "None or [low, high] with 0 <= low < high <= 1")


def model_differences(saved: CN, current: CN) -> list[str]:
    """Keys that describe the network itself and differ, as "KEY: saved -> current"."""
    names = ["NAME", "NUM_CLASSES"]
    lines = [
        f"MODEL.{name}: {saved.MODEL[name]!r} -> {current.MODEL[name]!r}"
        for name in names
        if saved.MODEL[name] != current.MODEL[name]
    ]
    for name in sorted({*saved.MODEL.KWARGS, *current.MODEL.KWARGS}):
        before, after = saved.MODEL.KWARGS.get(name), current.MODEL.KWARGS.get(name)
        if before != after:
            lines.append(f"MODEL.KWARGS.{name}: {before!r} -> {after!r}")
    return lines
