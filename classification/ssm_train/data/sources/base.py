"""What every format of image data offers: bytes and a label by index, and the checks that all formats share.

Random access is the point: a run that continues in the middle of an epoch asks for index 812,345 first.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ssm_train.common.decode import Decoder, check_size
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import open_regular

# a larger label is a mistake, and no reason for a classifier of its size
_MOST_CLASSES = 1_000_000
_SHARD_OF = re.compile(r"^(.*)-(\d+)-of-(\d+)(\..*)$")


class ImageSource(ABC):
    """Images of one split. Holds an index and no open file, so that it goes into loader workers by fork or pickle.

    `root` is what messages call it, `classes` the names that labels are positions in, `targets` the labels (n,) int64.
    A format is made by `Format(root, split, num_classes)`: it indexes the split ("train" or "val") of the folder `root`
    and raises UserError for what cannot be used; its LAYOUT says what must be there. Where `num_classes` is None, there
    are as many as the data have. `decoder` may be replaced.
    """

    CLASS = "class"  # what messages call one
    notes: Sequence[str] = ()
    """What a user should know of what was found, for the log, a line each."""

    def __init__(self, root: Path, classes: list[str], targets: Sequence[int]) -> None:
        self.root, self.classes, self.decoder = root, classes, Decoder()
        self.targets = np.asarray(targets, np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages and the list of bad images call the image."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image. Raises one of `decode.UNREADABLE`."""

    def decode(self, data: bytes) -> Image.Image:
        """What `read` gave, as an 8-bit image in the decoder's channels. Raises one of `decode.UNREADABLE`."""
        return self.decoder(data)


class PackedNames(Sequence[str]):
    """Strings in one buffer. A list of a million would be copied page by page into every forked worker that reads it,
    because reading counts references."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._buffer = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._buffer[self._ends[index] : self._ends[index + 1]])


def read_range(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """`size` bytes of a file from `offset`, or all to the end.

    Opens it anew: ten microseconds, against handles that forked workers would share or that would have to be reopened
    and closed in each. Raises OSError, and ValueError for a file that ends too early and for what cannot be an image.
    """
    with open_regular(path, follow=True, buffering=0) as file:
        size = os.fstat(file.fileno()).st_size - offset if size is None else size
        check_size(size)
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"the file ends after {offset + len(data)} bytes, but the image goes on to {offset + size}")
    return data


def check_member(name: str, archive: Path) -> None:
    """UserError for a member name that would leave the folder if the archive were unpacked: somebody means harm."""
    parts = re.split(r"[/\\]", name)
    if parts[0] == "" or re.match(r"[A-Za-z]:[/\\]", name) or ".." in parts:
        raise UserError(
            f"{archive} is refused: its member {name!r} points outside the archive; make the archive again with "
            "relative paths, or get it from a source that you trust"
        )


def check_label(label: object, num_classes: int | None, where: str) -> int:
    """The label, if it is an integer from 0 to `num_classes` - 1. Raises UserError, which starts with `where`."""
    end = _MOST_CLASSES if num_classes is None else num_classes
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < end:
        known = "" if num_classes is None else f"MODEL.NUM_CLASSES is {num_classes}, so "
        raise UserError(
            f"{where} has the label {label!r}, but {known}labels are integers from 0 to {end - 1}: correct the label "
            "or use --opts MODEL.NUM_CLASSES"
        )
    return label


def numbered_classes(targets: Sequence[int], num_classes: int | None) -> list[str]:
    """Names of classes that have numbers alone, up to the largest label where nobody says how many there are."""
    return [str(label) for label in range(int(np.max(targets, initial=-1)) + 1 if num_classes is None else num_classes)]


def check_class_count(where: Path, count: int, num_classes: int | None, noun: str) -> None:
    """UserError where the data has another number of classes than the model."""
    if num_classes is not None and count != num_classes:
        raise UserError(
            f"{where} holds {count} {noun}, but MODEL.NUM_CLASSES is {num_classes}: "
            f"use --opts MODEL.NUM_CLASSES {count} or another --data-path"
        )


def check_no_class_is_empty(source: ImageSource) -> None:
    """UserError for a class without images: a wrong number of classes or a part of the data that is missing."""
    empty = np.flatnonzero(np.bincount(source.targets, minlength=len(source.classes)) == 0)
    if len(empty):
        more = f" (nor of {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise UserError(
            f"{source.root} holds no image of class {source.classes[empty[0]]!r}{more}: add some, number the classes "
            "without gaps or lower MODEL.NUM_CLASSES"
        )


def find_files(root: Path, patterns: Sequence[str], wanted: str) -> list[Path]:
    """The files of the first of `patterns` (globs) that matches any, sorted by name.

    Raises UserError where none does, and for shards named NAME-00003-of-00012 of which one is missing.
    """
    for pattern in patterns:
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if found:
            _check_shards(found)
            return found
    raise UserError(f"--data-path {root} has none of {', '.join(patterns)}; {wanted}")


def _check_shards(paths: list[Path]) -> None:
    here = {path.name for path in paths}
    for path in paths:
        parts = _SHARD_OF.match(path.name)
        if parts is None:
            continue
        stem, digits, total, suffix = parts.groups()
        for number in range(int(total)):
            expected = f"{stem}-{number:0{len(digits)}d}-of-{total}{suffix}"
            if expected not in here:
                raise UserError(f"{path.parent} lacks {expected}, one of {int(total)} shards: download it again")
