"""A folder of digit scenes, in any layout: written complete or not at all, and checked when it is there already."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ssm_mm.digit_scenes import Scene, make_scene
from ssm_train.common.command import run
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import LOCK
from ssm_train.common.new_folder import MadeMeanwhile, new_folder

_COUNTS = {"train": 400, "val": 80}  # scenes that the command line writes unless told otherwise
_MANIFEST = "digit_scenes.json"

SplitWriter = Callable[[Path, str, Iterator[Scene]], None]  # (folder, split, its scenes)


def write_scenes(out: Path, layout: str, counts: dict[str, int], write_split: SplitWriter) -> bool:
    """Fill the new folder `out` with `counts` scenes per split; returns whether it had to be written.

    It is made aside and renamed, so `out` is complete. One that is there is compared with its manifest (the checksum
    of every file) and left alone. Raises UserError for a damaged folder, one with other scenes or something else in
    it, and one that cannot be written.
    """
    asked = {"layout": layout, **counts}
    try:
        if out.is_dir() and any(out.iterdir()):
            _verify(out, asked)
            return False
        with new_folder(out) as aside:
            for split, count in counts.items():
                write_split(aside, split, (make_scene(split, number) for number in range(count)))
            files = sorted(path for path in aside.rglob("*") if path.is_file() and path.name != LOCK)
            sums = {path.relative_to(aside).as_posix(): _checksum(path) for path in files}
            (aside / _MANIFEST).write_text(json.dumps({**asked, "files": sums}, indent=0))
    except MadeMeanwhile:
        _verify(out, asked)
        return False
    except OSError as error:
        raise UserError(f"cannot write the scenes to {out}: {error.strerror or error}") from error
    return True


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _verify(folder: Path, asked: dict[str, str | int]) -> None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        sums = dict(manifest.pop("files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder} is not empty and holds no readable {_MANIFEST}, so it is not ours: choose another --out"
        ) from None
    if manifest != asked:
        held, wanted = (", ".join(f"{key} {value}" for key, value in of.items()) for of in (manifest, asked))
        raise UserError(f"{folder} holds {held}, but {wanted} is asked for: choose another --out")
    for name, checksum in sums.items():
        path = folder / name
        if not path.is_file() or _checksum(path) != checksum:
            raise UserError(f"{path} is missing or was changed: delete {folder} and run this command again")


def scenes_command(argv: list[str] | None, prog: str, layout: str, write_split: SplitWriter) -> int:
    """Command line of both layouts; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description=f"Write scenes of handwritten digits, {layout} layout.")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    for split, count in _COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="number of scenes (default: %(default)s)")
    arguments = parser.parse_args(argv)
    counts = {split: getattr(arguments, split) for split in _COUNTS}

    def command() -> None:
        for split, count in counts.items():
            if count < 1:
                raise UserError(f"--{split} {count}: must be at least 1")
        written = write_scenes(arguments.out, layout, counts, write_split)
        print(f"digit scenes: {arguments.out} " + ("written" if written else "is complete"))

    return run(command)
