"""What can be done with a finished run, as command lines to copy."""

import os
import shlex
from pathlib import Path

from ssm_train.data.sources import ImageSource

_ANALYZE = Path(__file__).parents[2] / "analyze"  # beside classification/ in a checkout; not installed
_MOST_IMAGES = 4


def next_commands(folder: Path, source: ImageSource) -> list[tuple[str, str]]:
    """(what it does, command line) for the run in `folder`, whose validation images are `source`; for an installed copy
    none, which comes without the commands."""
    if not (_ANALYZE / "predict.py").is_file():
        return []
    found = []
    # one of each class, as far as a terminal can show and take the name
    firsts = [source.targets.tolist().index(label) for label in range(min(len(source.classes), _MOST_IMAGES))]
    images = [source.name(index) for index in firsts if source.name(index).isprintable()]
    if images and all(map(os.path.isfile, images)):
        out = folder / "predict.png"
        found.append(("what it says of pictures", _line("predict.py", folder, "--images", *images, "--out", out)))
    found.append(("to use it elsewhere", _line("export.py", folder, "--out", folder / "model.onnx")))
    return found


def _line(script: str, folder: Path, *arguments: str | Path) -> str:
    script = os.path.relpath(_ANALYZE / script)
    return shlex.join(["python", script, "--checkpoint", str(folder), *map(str, arguments)])
