"""Configs that are bombs, of wrong types, or no files: one line, at once. No YAML tag runs code."""

import os
import sys

import pytest

from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config, parse_config

from .child import run_limited

LEVELS = "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]\n" for n in range(12))
MERGES = "".join(f"k{n}: &a{n} {{x{n}: 1, <<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
TEXTS = {
    "laughter": (LEVELS, "unfolds to more than"),
    "laughter of keys": ("k0: &a0 {y: 1}\n" + MERGES, "unfolds to more than"),
    "itself": ("AUG: &a [*a]", "holds itself"),
    "its own key": ("&a AUG: {b: &b {c: *b}}", "holds itself"),
    "deep lists": ("[" * 20_000 + "]" * 20_000, "nested"),
    "somewhat deep lists": ("AUG: " + "[" * 40 + "]" * 40, "nested more than 30 deep"),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(300)), "nested"),
    "many values": ("AUG: [" + "1, " * 20_500 + "]", "values"),
    "long": ("# " + "x" * 100_000, "more than 65536 bytes"),
    "a long number": ("SEED: " + "9" * 5000, "a number of 5000 characters"),
    "a long number in sixties": ("SEED: 1" + ":30" * 9000, "a number of 27001 characters"),
    "a date that is none": ("SEED: 2026-99-99", "is not valid YAML"),
    "code": ("SEED: !!python/object/apply:os.system ['touch CANARY']", "is not valid YAML"),
    "an object": ("!!python/object:os._wrap_close {}", "is not valid YAML"),
    "a list": ("- a", "must be a mapping"),
    "a text": ("text", "must be a mapping"),
    "a number as key": ("1: 2", "is a int, not a name"),
    "a null as key": ("AUG: {null: 2}", "is a NoneType, not a name"),
    "a list as key": ("? [a]\n: 1", "is not valid YAML"),
    "sections as values": ("AUG: 3", "AUG is a section"),
    "values as sections": ("SEED: {a: 1}", "SEED must be of type int"),
    "a text for a number": ("SEED: one", "SEED must be of type int"),
    "an infinite number": ("TRAIN: {BASE_LR: .inf}", "TRAIN.BASE_LR"),
    "a base that is a number": ("BASE: 7", "BASE is 7"),
    "bases that are lists": ("BASE: [[a]]", "BASE is [['a']]"),
    "a base that is itself": ("BASE: a.yaml", "leads back to this file"),
    "a base that is nowhere": ("BASE: nowhere.yaml", "cannot read config"),
    "two documents": ("SEED: 1\n---\nSEED: 2", "is not valid YAML"),
    "control characters": ("SEED: \x1b[31m", "is not valid YAML"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, words = TEXTS[kind]
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config("a.yaml")
    message = str(caught.value)
    assert words in message and message.isprintable() and len(message) < 600, message
    if "base" not in kind:
        with pytest.raises(UserError):
            parse_config(text)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


CHILD = """
import sys
from pathlib import Path
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config, parse_config
refused = 0
for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    for read in (lambda: load_config(str(path)), lambda: parse_config(path.read_text())):
        try:
            read()
        except UserError:
            refused += 1
print(refused)
"""


def test_all_in_little_memory_and_time(tmp_path):
    """In a process of its own: none of them takes minutes or gigabytes."""
    for number, (text, _) in enumerate(TEXTS.values()):
        if "BASE" not in text:
            (tmp_path / f"{number}.yaml").write_text(text)
    count = len(list(tmp_path.iterdir()))
    done = run_limited([sys.executable, "-c", CHILD, str(tmp_path)], memory_gb=6, seconds=120)
    assert (done.returncode, done.stdout) == (0, f"{2 * count}\n"), done.stderr[-2000:]
    assert len(list(tmp_path.iterdir())) == count


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, words in {
        **{"pipe": "not a regular file", "zero": "not a regular file", "": "not a regular file"},
        **{"bytes": "is not valid YAML", "loop": "symbolic links", "nowhere": "No such file"},
    }.items():
        with pytest.raises(UserError, match=words):
            load_config(str(tmp_path / name))


def test_a_long_chain_of_bases(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"BASE: {number + 1}.yaml")
    with pytest.raises(UserError, match="more than 20 files lead to this one"):
        load_config(str(tmp_path / "0.yaml"))


@pytest.mark.parametrize("text", ["(" * 5000, "[" * 300 + "]" * 300, "9" * 5000, "-" * 100_000 + "1", "{1:" * 200])
def test_options_that_are_no_literals(tiny_cfg, text):
    with pytest.raises(UserError) as caught:
        load_config(str(tiny_cfg), ["SEED", text])
    assert len(str(caught.value)) < 600


def test_names_that_a_config_may_use_twice(tmp_path):
    """Repetitions are fine where they are few."""
    (tmp_path / "a.yaml").write_text("TRAIN: {BETAS: &b [0.8, 0.9], SCHEDULER: {MULTISTEPS: *b}}")
    assert load_config(str(tmp_path / "a.yaml")).TRAIN.BETAS == [0.8, 0.9]
