"""What the tests of detection and segmentation share: short runs of the tools on scenes of digits."""

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
_SHORT = ["train_dataloader.batch_size=2", "log_level=ERROR"] + [
    f"{split}_dataloader.{key}"
    for split in ("train", "val", "test")
    for key in ("num_workers=0", "persistent_workers=False")
]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


class Task(NamedTuple):
    """Detection or segmentation."""

    name: str
    """Of its folder."""
    config: Path
    short: list[str]
    """Options that make a training a matter of seconds."""

    def flags(self, data: Path, *options: str) -> list[str]:
        return ["--data-root", str(data), "--cfg-options", *_SHORT, *self.short, *options]

    def launch(self, script: str, *arguments: object, data: Path, cwd: Path, port: int) -> None:
        """One of the shell scripts, in processes of its own."""
        environment = {"PYTHON": sys.executable, "PORT": str(port), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        command = ["bash", str(ROOT / self.name / "tools" / script), str(self.config), *map(str, arguments)]
        command += self.flags(data)
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]


def caller(task: Task, data: Path, capfd: pytest.CaptureFixture) -> Callable[..., Outcome]:
    """call(tool, *arguments, config=, options=, root=): a tool in this process, short, on the scenes."""

    from mmengine.logging import MessageHub

    def call(tool, *arguments: object, config: object = task.config, options=(), root: Path = data) -> Outcome:
        capfd.readouterr()
        # mmengine names what a run has measured by the second it began in: two of one second would share it
        MessageHub._instance_dict.clear()
        status = tool.main([str(config), *map(str, arguments), *task.flags(root, *options)])
        return Outcome(status, *capfd.readouterr())

    return call


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that the first of several test processes fills, for all of them to read."""
    base = factory.getbasetemp()
    # processes of pytest-xdist have a folder each in that of the run
    base = base.parent if base.name.startswith("popen-") else base
    with FileLock(base / f"{name}.lock"):
        filled = base / f"{name}.filled"
        if not filled.exists():
            fill(base / name)
            filled.touch()
    return base / name


def refuses(outcome: Outcome, *parts: str) -> None:
    """Exit status 2 after one line that says all this."""
    line = outcome.err.strip().splitlines()[-1]
    assert outcome.status == 2 and line.startswith("error: "), outcome.err
    for part in parts:
        assert part in line, line


def metrics_of(folder: Path) -> dict[str, float]:
    """What a test wrote into its work folder."""
    [path] = folder.glob("*/*.json")
    return json.loads(path.read_text())


def recorded(folder: Path, name: str) -> dict[str, float]:
    """The validation in a training's log that has the metric `name`."""
    log = [json.loads(line) for line in next(folder.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    return next(entry for entry in log if name in entry)


@contextlib.contextmanager
def mmengine_without_overhead() -> Iterator[None]:
    """Without what takes most of the time of a short run and no test looks at: the beauty of configs as text, reports
    of the machine, and reading the packages' indices of models again for every config."""
    from mmengine.config import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.config.config.FormatCode", lambda text, **style: (text, True))
        patch.setattr("mmengine.runner.runner.collect_env", dict)
        patch.setattr(utils, "load", functools.cache(utils.load))
        yield


def config_with(base: Path, path: Path, **values: Any) -> Path:
    """A config at `path` that inherits `base` and sets `values`."""
    lines = [f"_base_ = {str(base)!r}", *(f"{name} = {value!r}" for name, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path
