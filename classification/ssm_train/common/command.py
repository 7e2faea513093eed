"""Every command of the repository ends the same way: a mistake of the user is one line on stderr and exit status 2."""

import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ssm_train.common.distributed import is_local_main
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import disk_full_message, is_disk_full
from ssm_train.common.preemption import Preempted

_GRACE_SECONDS = 5
_INTERRUPTED = 130  # what shells report of a program that Ctrl-C has ended

# import names of this repository, which an installed copy or another checkout may have as well
_OURS = ("ssm_ops", "ssm_models", "ssm_train", "ssm_mm", "detection", "segmentation", "analyze")


def run(command: Callable[[], int | None]) -> int:
    """Run a command; returns its exit status: its own, else 0, also where it was asked to stop and saved; 130 after
    Ctrl-C that saved nothing; or 2 after the one line of a UserError, or of a file that cannot be written or read. Of
    several processes, one a machine speaks."""
    for stream in (sys.stdout, sys.stderr):
        # a name that the terminal's encoding does not have must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        check_checkout()
        status = command()
    except Preempted as stopped:
        if is_local_main():
            print(stopped)
        return 0
    except KeyboardInterrupt:
        if is_local_main():
            print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except UserError as error:
        # one that was raised in a loader's worker arrives with that worker's traceback in front
        message = str(error).rpartition(f"{UserError.__name__}: ")[2]
    except OSError as error:
        if is_disk_full(error):
            message = disk_full_message(error)
        elif error.filename is not None:
            # an output that cannot be written, mostly: a folder in its place, or one that is not ours
            message = str(UserError(f"{os.fsdecode(error.filename)}: {error.strerror}; choose another path"))
        else:
            raise
    else:
        return status or 0
    if is_local_main():
        print(f"error: {message}", file=sys.stderr)
    else:
        # a launcher kills all processes as soon as one has ended: leave the one that speaks the time to do it
        time.sleep(_GRACE_SECONDS)
    return 2


def check_checkout() -> None:
    """UserError where the script that was started lies in one checkout and what it imports in another.

    `python classification/main.py` finds its neighbours beside itself, but `ssm_ops` and the other folders through the
    environment, in which another checkout may be installed: results would be of neither.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    checkout = _checkout_of(Path(script).resolve()) if script else None
    if checkout is None:
        return
    for name in _OURS:
        module = sys.modules.get(name)
        if module is None or module.__file__ is None:
            continue
        if not Path(module.__file__).resolve().is_relative_to(checkout):
            raise UserError(
                f"{script} would run with the {name} of {Path(module.__file__).parent}, another copy of this "
                f"repository: pip install --no-build-isolation --no-deps -e {checkout}"
            )


def _checkout_of(path: Path) -> Path | None:
    """The folder of the checkout that holds `path`; None where `path` is installed or somebody else's."""
    if path.is_relative_to(Path(sys.prefix).resolve()):
        return None  # an environment may lie in a checkout and serve another: pytest, torchrun
    return next((folder for folder in path.parents if (folder / "kernels" / "ssm_ops" / "__init__.py").is_file()), None)
