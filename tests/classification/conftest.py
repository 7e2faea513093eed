"""A tiny image folder, a tiny config, and calls of the real command line inside the test process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ssm_train.cli import main
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.data.build import scan_split

MAIN = Path(__file__).parents[2] / "classification" / "main.py"

CLASSES = ("cat", "dog", "eel")
TRAIN_PER_CLASS, VAL_PER_CLASS = 7, 5  # 21 and 15 images: divisible by no batch size used here but their own factors


# a script: RANK MARK and the command's own arguments. The worker of that rank kills itself once, when there is no MARK
KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
from ssm_train import trainer
from ssm_train.cli import main
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.data.build import scan_split

original = trainer.take_update

def update(run, *args, **kwargs):
    mark = Path(sys.argv[2])
    if os.environ["RANK"] == sys.argv[1] and run.updates == 7 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, *args, **kwargs)

trainer.take_update = update
sys.exit(main(sys.argv[3:]))
"""


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
        "DATA": {"DATA_PATH": str(image_tree), "BATCH_SIZE": 4, "IMG_SIZE": 32, "NUM_WORKERS": 0, "MAX_BAD_SHARE": 0.2},
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
def cli(tiny_cfg, capsys, monkeypatch):
    """Run `classification/main.py --cfg tiny.yaml ...` in this process: cli(*arguments) -> Outcome.

    Without drawing curves and sheets, which takes longer than such a run.
    """
    monkeypatch.setattr("ssm_train.record.report.save_curves", lambda *_: None)
    monkeypatch.setattr("ssm_train.answering.save_worst", lambda *_: None)

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


@pytest.fixture
def torchrun(tmp_path):
    """Run a script under torchrun: torchrun(processes, *arguments, script=main.py, options=()) -> CompletedProcess."""

    def run(
        processes: int, *arguments: object, script: Path = MAIN, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}", *options]
        # the launcher leaves a folder in TMPDIR
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        command = [sys.executable, *launcher, str(script), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def state_of():
    """state_of(checkpoint folder) -> every tensor and number in it, under one flat name."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        tensors = {}
        for file in ("model", "model_ema"):
            tensors |= {f"{file}/{name}": value for name, value in load_file(folder / f"{file}.safetensors").items()}
        train_state = torch.load(folder / "train_state.pt", weights_only=True)
        for name, state in train_state["optimizer"].items():
            tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items()}
        tensors["updates"] = torch.tensor(train_state["updates"])
        return tensors | {f"scaler/{key}": torch.tensor(value) for key, value in train_state["scaler"].items()}

    return read


@pytest.fixture(scope="session")
def same_state(state_of):
    """same_state(folder, folder): all tensors of two checkpoints are equal, bit for bit."""

    def compare(one: Path, other: Path) -> None:
        expected, found = state_of(one), state_of(other)
        assert expected.keys() == found.keys() and len(expected) > 100
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name

    return compare


@pytest.fixture
def config(tiny_cfg):
    """config(DATASET, DATA_PATH, key, value, ...) -> cfg."""

    def make(dataset: str, path: Path, *opts: object):
        pairs = ["DATA.DATASET", dataset, "DATA.DATA_PATH", str(path), *map(str, opts)]
        return load_config(str(tiny_cfg), pairs)

    return make


@pytest.fixture
def refused(config, tmp_path):
    """refused(DATASET, *parts): scanning tmp_path fails with all parts in its one line."""

    def check(dataset: str, *parts: str, split: str = "train", opts: tuple[object, ...] = ()) -> None:
        with pytest.raises(UserError) as error:
            scan_split(config(dataset, tmp_path, *opts), split)
        assert "\n" not in str(error.value)
        for part in parts:
            assert part in str(error.value)

    return check
