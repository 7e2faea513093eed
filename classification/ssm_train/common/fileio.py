"""Files that appear complete or not at all: write aside, fsync, rename, fsync the folder; and a lock.

A kill leaves what was written aside, `.tmp-*`; whoever locks the folder next removes it.
"""

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from ssm_train.common.errors import UserError

# what the operating system says when the disk, the quota or the file-size limit is used up
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# how the names of what is being written begin
ASIDE = ".tmp-"


def is_disk_full(error: OSError) -> bool:
    """Whether `error` means that there is no room left to write."""
    return error.errno in _NO_SPACE


def disk_full_message(error: OSError) -> str:
    """For the user."""
    where = error.filename or "the logs"
    return f"no room left to write {where} ({error.strerror}): free some space and continue with --resume auto"


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` to a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Replace the file `path` by `text`: readers see the old or the new content, never a part of it."""
    aside = path.with_name(f"{ASIDE}{os.getpid()}-{path.name}")
    try:
        write_synced(aside, text.encode())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def link_atomic(link: Path, target: str) -> None:
    """Point the symlink `link` at the relative `target`, replacing an older link in one step."""
    aside = link.with_name(f"{ASIDE}{os.getpid()}-{link.name}")
    aside.unlink(missing_ok=True)
    os.symlink(target, aside)
    os.replace(aside, link)
    sync_folder(link.parent)


def remove_asides(folder: Path) -> None:
    """Remove the files and links that killed processes left half-written. For the owner of the folder's lock."""
    for path in folder.glob(f"{ASIDE}*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to `folder` (created if it is not there); UserError when one does already.

    The operating system gives the lock back when this process ends, however it ends. A POSIX record lock and not
    flock(): the latter would live on in the loader's workers after a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, or choose another "
                "--tag or --output"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        remove_asides(folder)
        yield
