"""Files that appear complete or not at all: write aside, fsync, rename, fsync the folder."""

import errno
import os
from pathlib import Path

# what the operating system says when the disk, the quota or the file-size limit is used up
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_disk_full(error: OSError) -> bool:
    """Whether `error` means that there is no room left to write."""
    return error.errno in _NO_SPACE


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
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write_synced(aside, text.encode())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def link_atomic(link: Path, target: str) -> None:
    """Point the symlink `link` at the relative `target`, replacing an older link in one step."""
    aside = link.with_name(f".tmp-{os.getpid()}-{link.name}")
    aside.unlink(missing_ok=True)
    os.symlink(target, aside)
    os.replace(aside, link)
    sync_folder(link.parent)
