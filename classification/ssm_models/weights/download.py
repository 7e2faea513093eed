"""From an entry of the table to a checked file on this machine.

Files come through the libraries that timm uses for such addresses and lie in their caches: huggingface_hub's for
huggingface.co (HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME hold), torch.hub's for all others (TORCH_HOME).
SSM_MODELS_GITHUB, if set, is asked in place of https://github.com.

A file is read only after a check: its sha256 where one is published, else that it is whole. Beside it lies a lock file
with the sha256 that was seen, FILE.lock.json; a file that comes again must be the same.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from filelock import FileLock
from timm.models._hub import get_cache_dir
from torch.hub import download_url_to_file

from ..unpickle import CheckpointError
from .table import Entry

_log = logging.getLogger(__name__)

GITHUB, HUGGING_FACE = "https://github.com/", "https://huggingface.co/"
MIRROR_VARIABLE = "SSM_MODELS_GITHUB"
_TRIES, _PAUSE_SECONDS = 3, 1.0
_CHUNK = 1 << 20


def fetch(entry: Entry, cache_dir: str | Path | None = None) -> Path:
    """The file of `entry`: from the cache, else from its address. `cache_dir` replaces the library's cache folder.

    Raises:
        CheckpointError: it cannot be had, or is not the published file. The message says what to do.
    """
    if entry.url.startswith(HUGGING_FACE):
        path = _from_hugging_face(entry, cache_dir)
        # where the hub's cache keeps revisions apart, the lock stands for the name, not for the revision
        lock = cache_folder(cache_dir) / f"{entry.filename}.lock.json"
        _check(entry, path, lock)
        return path
    folder = cache_folder(cache_dir)
    path, lock = folder / entry.filename, folder / f"{entry.filename}.lock.json"
    if not path.is_file():
        if _offline():
            raise CheckpointError(f"{entry.name} is not here, and HF_HUB_OFFLINE is set: {_by_hand(entry, path)}")
        with _alone(path):
            # another process may have been here while this one waited
            if not path.is_file():
                _download(entry, path)
    _check(entry, path, lock)
    return path


def cached(entry: Entry, cache_dir: str | Path | None = None) -> Path | None:
    """The file of `entry` if it is on this machine already. Nothing is checked or downloaded."""
    if entry.url.startswith(HUGGING_FACE):
        from huggingface_hub import constants, try_to_load_from_cache

        found = try_to_load_from_cache(*_hub_place(entry), cache_dir=cache_dir or constants.HF_HUB_CACHE)
        return Path(found) if isinstance(found, str) else None
    path = cache_folder(cache_dir) / entry.filename
    return path if path.is_file() else None


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    return Path(cache_dir) if cache_dir else Path(get_cache_dir())


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---- from an address ---------------------------------------------------------------------------------------------


def _download(entry: Entry, path: Path) -> None:
    url = entry.url
    if url.startswith(GITHUB) and os.environ.get(MIRROR_VARIABLE):
        url = os.environ[MIRROR_VARIABLE].rstrip("/") + "/" + url.removeprefix(GITHUB)
    path.parent.mkdir(parents=True, exist_ok=True)
    _log.info("downloading %s to %s", url, path)
    _attempt(lambda: download_url_to_file(url, str(path)), entry, url, path)


def _hub_place(entry: Entry) -> tuple[str, str]:
    """(repository, file) of an address https://huggingface.co/OWNER/REPO/resolve/main/FILE."""
    owner, repository, _, _, *file = urlsplit(entry.url).path.strip("/").split("/")
    return f"{owner}/{repository}", "/".join(file)


def _from_hugging_face(entry: Entry, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants, hf_hub_download

    repository, file = _hub_place(entry)
    # the hub reads its variables once, when it is imported
    endpoint = os.environ.get("HF_ENDPOINT", HUGGING_FACE).rstrip("/")
    folder = Path(cache_dir or constants.HF_HUB_CACHE)

    def load() -> str:
        return hf_hub_download(repository, file, cache_dir=folder, endpoint=endpoint, local_files_only=_offline())

    return Path(_attempt(load, entry, entry.url.replace(HUGGING_FACE, f"{endpoint}/", 1), folder / file))


def _attempt(load: Callable[[], str | None], entry: Entry, url: str, path: Path) -> str | None:
    """Call `load`, again where the server is busy or the line was cut; CheckpointError with the way out at the end."""
    for left in reversed(range(_TRIES)):
        try:
            return load()
        except OSError as error:  # of urllib, of the hub (HfHubHTTPError, LocalEntryNotFoundError), of the disk
            status = _status(error)
            # where there is no connection, the hub has tried again by itself
            busy = isinstance(error, URLError) if status is None else status >= 500
            if left and busy:
                time.sleep(_PAUSE_SECONDS)
                continue
            raise CheckpointError(_explain(error, status, entry, url, path)) from error
    raise AssertionError("the last try returns or raises")


def _status(error: OSError) -> int | None:
    """The HTTP status that `error` tells of."""
    if isinstance(error, HTTPError):
        return error.code
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if response is not None:
            return response.status_code
    return None


def _explain(error: OSError, status: int | None, entry: Entry, url: str, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room left for {path.name} in {path.parent}: free some space, or name another cache_dir"
    if error.errno in (errno.EACCES, errno.EROFS):
        return (
            f"{path.parent} cannot be written ({error.strerror}): name another cache_dir, or set TORCH_HOME or HF_HOME"
        )
    if status == 404:
        known = f"; published mirrors: {', '.join(entry.mirrors)}" if entry.mirrors else ""
        return f"{url} is not there (404){known}; {_by_hand(entry, path)}"
    if status is not None:
        return f"{url} answers with status {status}: try later, or {_by_hand(entry, path)}"
    reason = error.reason if isinstance(error, URLError) else type(error).__name__
    return f"{url} cannot be reached ({reason}): {_by_hand(entry, path)}"


def _by_hand(entry: Entry, path: Path) -> str:
    """What helps a machine without that address."""
    if entry.url.startswith(HUGGING_FACE):
        return "set HF_ENDPOINT to a mirror, or give the path of a file that was downloaded elsewhere"
    return f"set {MIRROR_VARIABLE} to a mirror of {GITHUB}, or put the file there: {path}"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _alone(path: Path) -> contextlib.AbstractContextManager:
    """Keep other processes from downloading the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


# ---- checks ------------------------------------------------------------------------------------------------------


def verify(entry: Entry, path: Path) -> str:
    """Read all of the file and compare it with what is published of it; returns its sha256.

    Raises:
        CheckpointError: it is another file, or half of one. It was set aside.
    """
    digest = sha256_of(path)
    if entry.sha256 is not None and digest != entry.sha256:
        raise CheckpointError(
            f"{path.name} has the sha256 {digest[:16]}..., but {entry.sha256[:16]}... is published for {entry.name}: "
            f"{_set_aside(path)}"
        )
    if entry.bytes is not None and path.stat().st_size != entry.bytes:
        raise CheckpointError(
            f"{path.name} has {path.stat().st_size} bytes instead of {entry.bytes}: {_set_aside(path)}"
        )
    # the table of contents of these files is their end
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path.name} is no whole file of weights (a cut download, a page of text?): {_set_aside(path)}"
        )
    return digest


def _check(entry: Entry, path: Path, lock: Path) -> None:
    """`verify` once; later only compare the size with the lock file."""
    seen = json.loads(lock.read_text()) if lock.is_file() else None
    size = path.stat().st_size
    if seen is not None and seen["bytes"] == size and entry.sha256 in (None, seen["sha256"]):
        return
    digest = verify(entry, path)
    if seen is not None and seen["sha256"] != digest:
        raise CheckpointError(
            f"{path.name} has the sha256 {digest[:16]}..., but an earlier download had {seen['sha256'][:16]}...: "
            f"{_set_aside(path)}; if the authors changed it, delete {lock.name}"
        )
    if os.access(lock.parent, os.W_OK):
        aside = lock.with_name(f".tmp-{os.getpid()}-{lock.name}")
        aside.write_text(json.dumps({"url": entry.url, "sha256": digest, "bytes": size}) + "\n")
        os.replace(aside, lock)


def _set_aside(path: Path) -> str:
    """Rename a file that must not be read; says where it is."""
    if not os.access(path.parent, os.W_OK):
        return "not loaded"
    # in the hub's cache it is a link, and the hub would make the link again to what lies behind it
    file, rejected = path.resolve(), path.with_name(f"{path.name}.rejected")
    os.replace(file, rejected)
    path.unlink(missing_ok=True)
    return f"not loaded, kept beside it as {rejected.name}"
