"""The configuration: defaults, YAML files with `BASE`, `--opts`, and the table of command-line flags.

Later wins: defaults < BASE files < the file < --opts < flags. Every key exists in `default_config` (defaults.py), but
MODEL.KWARGS takes any key: it is passed to `timm.create_model` as it is.
"""

import ast
import difflib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from ssm_train.common.errors import UserError
from ssm_train.config.defaults import OPEN, check_config, default_config, lookup
from ssm_train.config.yaml_text import parse_yaml, read_yaml

# command-line flag -> config key; a flag that was not given is None and leaves the key alone, so 0 and "" do apply
FLAG_KEYS = {
    "batch_size": "DATA.BATCH_SIZE",
    "data_path": "DATA.DATA_PATH",
    "dataset": "DATA.DATASET",
    "cache_mode": "DATA.CACHE_MODE",
    "img_size": "DATA.IMG_SIZE",
    "pretrained": "MODEL.PRETRAINED",
    "new_head": "MODEL.NEW_HEAD",
    "epochs": "TRAIN.EPOCHS",
    "lr": "TRAIN.BASE_LR",
    "output": "OUTPUT",
    "tag": "TAG",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "optim": "TRAIN.OPTIMIZER",
    "model_ema_decay": "TRAIN.EMA_DECAY",
    "mesa_value": "TRAIN.MESA",
    "memory_limit_rate": "MEMORY_SHARE",
    "amp": "AMP",
    "compile": "COMPILE",
    "channels_last": "CHANNELS_LAST",
    "device": "DEVICE",
}


_LONGEST_CHAIN = 20
_LARGEST = 1 << 63


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
    check_config(cfg)
    cfg.freeze()
    return cfg


def parse_config(text: str) -> CN:
    """The inverse of `cfg.dump()`: the config of a checkpoint or of a run's config.yaml. UserError for other text."""
    cfg = default_config()
    content = parse_yaml(text, "saved config")
    if not isinstance(content, dict):
        raise UserError(f"saved config must be a mapping of keys to values, not a {type(content).__name__}")
    _merge_mapping(cfg, content, prefix="", source="saved config")
    check_config(cfg)
    cfg.freeze()
    return cfg


def _merge_file(cfg: CN, path: Path, chain: tuple[Path, ...]) -> None:
    path = Path(os.path.realpath(path))  # which names loops of links, too
    if path in chain:
        raise UserError(f"{path}: BASE leads back to this file; remove one of the BASE entries")
    if len(chain) == _LONGEST_CHAIN:
        raise UserError(f"{path}: more than {_LONGEST_CHAIN} files lead to this one by BASE; shorten the chain")
    content = read_yaml(path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must be a mapping of keys to values, not a {type(content).__name__}")
    bases = content.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"config {path}: BASE is {bases!r:.80}, but must be the name of a file, or a list of names")
    for base in bases:
        _merge_file(cfg, path.parent / base, chain=(*chain, path))
    _merge_mapping(cfg, content, prefix="", source=str(path))


def _merge_mapping(cfg: CN, mapping: dict[str, Any], prefix: str, source: str) -> None:
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise UserError(f"{source}: config key {prefix}{name!r:.80} is a {type(name).__name__}, not a name")
        key = f"{prefix}{name}"
        if isinstance(lookup(cfg, key), CN) and isinstance(value, dict):
            _merge_mapping(cfg, value, prefix=f"{key}.", source=source)
        else:
            _set(cfg, key, value, source)


def _set(cfg: CN, key: str, value: Any, source: str) -> None:
    """Assign one key, converting text to the type of the default."""
    section, _, name = key.rpartition(".")
    node = lookup(cfg, section) if section else cfg
    if not isinstance(node, CN) or (name not in node and not node.is_new_allowed()):
        near = difflib.get_close_matches(key.upper(), list(_keys(cfg)), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see classification/ssm_train/config/defaults.py"
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
    if key in OPEN:
        if value is not None and type(value) is not int:
            raise UserError(f"{source}: {key} must be of type int, or None, not {value!r:.80}")
        return value
    if isinstance(old, float) and type(value) is int and abs(value) < _LARGEST:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{source}: {key} is {value}, but must be a finite number")
    if isinstance(old, list) and isinstance(value, tuple):
        return list(value)
    if old is None and isinstance(value, list | tuple | None):
        return value if value is None else list(value)
    if type(value) is not type(old):
        wanted = "list" if old is None else type(old).__name__
        raise UserError(f"{source}: {key} must be of type {wanted}, not {value!r:.80}")
    return value


def _literal(text: str) -> Any:
    """A Python literal (1, 1e-3, [1, 2], None) or YAML's true/false; any other text stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the latter two: brackets in brackets
        return text


def model_differences(saved: CN, current: CN) -> list[str]:
    """Keys that describe the network itself and differ, as "KEY: saved -> current"; not those that are open now."""
    names = ["NAME", "NUM_CLASSES"]
    lines = [
        f"MODEL.{name}: {saved.MODEL[name]!r} -> {current.MODEL[name]!r}"
        for name in names
        if current.MODEL[name] not in (None, saved.MODEL[name])
    ]
    for name in sorted({*saved.MODEL.KWARGS, *current.MODEL.KWARGS}):
        before, after = saved.MODEL.KWARGS.get(name), current.MODEL.KWARGS.get(name)
        if before != after:
            lines.append(f"MODEL.KWARGS.{name}: {before!r} -> {after!r}")
    return lines
