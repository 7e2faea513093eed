"""Files that appear complete or not at all: write aside, fsync, rename, fsync the folder; and a lock.

A kill leaves what was written aside, `.tmp-*`; whoever locks the folder next removes it.
"""

import contextlib
import errno
import json
import math
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ssm_train.common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# what the operating system says when the disk, the quota or the file-size limit is used up
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# ... and when the file system has no links, as those of memory cards and some network drives
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# how the names of what is being written begin
ASIDE = ".tmp-"
LOCK, _LOCK_BYTES = ".lock", 256
# Windows lets nobody read what is locked: a byte that no text reaches
_LOCKED = 1 << 20
# O_BINARY keeps Windows from translating the ends of lines. It lacks the other two, but has no pipes in folders either
_OPEN = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def is_disk_full(error: OSError) -> bool:
    """Whether `error` means that there is no room left to write."""
    return error.errno in _NO_SPACE


def disk_full_message(error: OSError) -> str:
    """For the user."""
    where = error.filename or "the logs"
    return f"no room left to write {where} ({error.strerror}): free some space and continue with --resume auto"


def open_regular(path: str | Path, follow: bool = False, buffering: int = -1) -> BinaryIO:
    """Open a file to read, if it is one: no device or pipe, whose reading might never end, nor a link, unless they are
    to be followed. Raises OSError, whose strerror says what it is instead."""
    if not follow and os.path.islink(path):
        raise OSError(errno.ELOOP, "a link, not a file", str(path))
    handle = os.open(path, _OPEN | (0 if follow else _NO_FOLLOW))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb", buffering=buffering)


def to_json(value: Any, **layout: Any) -> str:
    """JSON text of plain values, laid out as json.dumps is told; numbers that are not finite become null."""
    return json.dumps(finite(value), allow_nan=False, **layout)


def finite(value: Any) -> Any:
    """A value for JSON, which has no infinities: None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` to a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows opens no folders, and does so by itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Replace the file `path` by `text`: readers see the old or the new content, never a part of it."""
    aside = path.with_name(f"{ASIDE}{os.getpid()}-{path.name}")
    try:
        # names of files may be no UTF-8
        write_synced(aside, text.encode(errors="backslashreplace"))
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def link_atomic(link: Path, target: str) -> bool:
    """Point the symlink `link` at the relative `target`, replacing an older link in one step. False where there can be
    none: some file systems have no links, and Windows asks for a right that users do not have."""
    if os.name == "nt":
        return False
    aside = link.with_name(f"{ASIDE}{os.getpid()}-{link.name}")
    aside.unlink(missing_ok=True)
    try:
        os.symlink(target, aside)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    os.replace(aside, link)
    sync_folder(link.parent)
    return True


def remove_asides(folder: Path) -> None:
    """Remove the files and links that killed processes left half-written. For the owner of the folder's lock."""
    for path in folder.glob(f"{ASIDE}*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()


def lock_path(folder: Path) -> Path:
    """The file that locks `folder`: inside, so that it moves along. On Windows, which moves no folder with an open file
    in it, beside it."""
    folder = folder.absolute()
    return folder / LOCK if fcntl is not None else folder.with_name(f"{LOCK}-{folder.name}")


def _take(file: BinaryIO) -> None:
    """Lock an open file. Raises BlockingIOError or PermissionError where another process has."""
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        file.seek(_LOCKED)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


class FolderLock:
    """A folder that this process alone writes to."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self.folder, self._file = folder, file

    def holds(self) -> bool:
        """Whether the folder under its name still is the one that was locked."""
        try:
            found = os.stat(lock_path(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self.folder.is_dir() and os.path.samestat(found, os.fstat(self._file.fileno()))


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[FolderLock]:
    """Keep other processes from writing to `folder` (created if it is not there); UserError when one does already.

    The operating system gives the lock back when this process ends, however it ends. A POSIX record lock and not
    flock(): the latter would live on in the loader's workers after a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(lock_path(folder), "ab+") as file:
        try:
            _take(file)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read(_LOCK_BYTES).decode(errors="replace").strip()
            raise UserError(
                f"{folder} is in use by {owner or 'another process'}: wait for it, or choose another --tag or --output"
            ) from error
        lock = FolderLock(folder, file)
        # somebody may have moved the folder between the two steps
        if not lock.holds():
            raise UserError(f"{folder} was moved or removed by another process just now: run this command again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        file.flush()
        remove_asides(folder)
        yield lock
