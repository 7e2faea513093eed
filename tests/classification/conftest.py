"""A tiny image folder, a tiny config, and calls of the real command line inside the test process."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from classification.main import main

CLASSES = ("cat", "dog", "eel")
TRAIN_PER_CLASS, VAL_PER_CLASS = 7, 5  # 21 and 15 images: divisible by no batch size used here but their own factors


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def _write_tree(root: Path) -> None:
    """Noise on a class colour: learnable in a few steps, different in every pixel."""
    random = np.random.default_rng(0)
    for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 120, (32, 32, 3))
                pixels[..., number] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """Shared and read-only."""
    root = tmp_path_factory.mktemp("images") / "tree"
    _write_tree(root)
    return root


@pytest.fixture
def own_tree(tmp_path) -> Path:
    """For a test that damages it."""
    _write_tree(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture(scope="session")
def tiny_cfg(tmp_path_factory, image_tree) -> Path:
    """A config file: vmamba_nano without randomness in training, fp32 on the CPU, 2 epochs of 5 updates of 4 images."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    off = {"HFLIP": 0.0, "COLOR_JITTER": 0.0, "AUTO_AUGMENT": "", "REPROB": 0.0, "MIXUP": 0.0, "CUTMIX": 0.0}
    config = {
        "DATA": {"DATA_PATH": str(image_tree), "BATCH_SIZE": 4, "IMG_SIZE": 32, "NUM_WORKERS": 0},
        "MODEL": {
            "NAME": "vmamba_nano",
            "NUM_CLASSES": len(CLASSES),
            "DROP_PATH_RATE": 0.0,
            "KWARGS": {"dims": 8, "depths": [1, 1]},
        },
        "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 1, "BASE_LR": 0.1, "EMA_DECAY": 0.9},
        "AUG": off,
        "AMP": "off",
        "DEVICE": "cpu",
        "PRINT_FREQ": 1,
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def cli(tiny_cfg, capsys):
    """Run `classification/main.py --cfg tiny.yaml ...` in this process: cli(*arguments) -> Outcome."""

    def call(*arguments: object, cfg: Path = tiny_cfg) -> Outcome:
        capsys.readouterr()
        status = main(["--cfg", str(cfg), *map(str, arguments)])
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture
def fails(cli):
    """Run a command that must fail as the user's mistake, with all `parts` in its one line; returns that line."""

    def call(*arguments: object, parts: tuple[str, ...], **options: Path) -> str:
        outcome = cli(*arguments, **options)
        assert outcome.status == 2, outcome
        lines = outcome.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
        for part in parts:
            assert part in lines[0], lines[0]
        return lines[0]

    return call


@pytest.fixture
def read_log():
    """read_log(run folder, kind) -> the entries of that kind in log.jsonl."""

    def read(folder: Path, kind: str) -> list[dict]:
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [entry for entry in entries if entry["kind"] == kind]

    return read


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit comparisons need one order of summation, and the machine may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
