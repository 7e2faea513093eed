"""A folder of data that is made once: complete or absent, also where it is killed, and where two make it at a time."""

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import ASIDE, folder_lock, lock_path, sync_folder


class MadeMeanwhile(Exception):
    """Somebody else has made the folder in the meantime."""


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` when the block has ended and removed when it has failed; what a
    killed process left of such a folder is removed first. Raises MadeMeanwhile, and OSError for what the system says.
    """
    final = out.absolute()
    for left in final.parent.glob(f"{ASIDE}*-{glob.escape(final.name)}"):
        # the lock of a process that still fills it is refused
        with contextlib.suppress(UserError), folder_lock(left):
            shutil.rmtree(left)
    aside = final.with_name(f"{ASIDE}{os.getpid()}-{final.name}")
    try:
        with folder_lock(aside):
            yield aside
            if lock_path(aside).parent == aside:  # else it is no part of the folder, and open
                lock_path(aside).unlink()
            try:
                # replaces an empty folder; not by its absolute name, for the system refuses to replace "."
                os.rename(aside, out)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise MadeMeanwhile from error
                raise
        sync_folder(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock_path(aside).unlink(missing_ok=True)
