"""A person's own photographs: a folder for each class, with or without a split, and whatever else lies there."""

import csv
import functools
import hashlib
import io
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ssm_models.printable import printable
from ssm_models.weights.download import sha256_of
from ssm_train.common.decode import UNREADABLE, Decoder, check_size
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import open_regular, write_atomic
from ssm_train.common.image_names import is_hidden, is_image
from ssm_train.common.timing import Every
from ssm_train.data.sources.base import ImageSource, PackedNames, check_class_count, read_range
from ssm_train.data.sources.folder import class_folders, files_below

_log = logging.getLogger(__name__)

_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation", "test", "testing")
_MOST_NAMED = 5
_MOST_CLASSES_NAMED = 30
_SECONDS = 5.0  # between two lines while many files are looked at
_CACHED = 1 << 17  # files, of which the header is read once for both splits


class Photo(NamedTuple):
    path: str
    name: str
    """Within the class folder."""
    content: str
    """What tells it from others: the SHA-256 of the file where another file has its size, else the path."""


class PhotoSource(ImageSource):
    """Class folders of photographs.

    root/<class>/**/*                `share` of every class is set apart for validation
    root/{train,val}/<class>/**/*    the split is that of the folders; val may be called valid, validation or test, too

    The split of a class depends on `seed` and on the names of its images alone: those with the smallest hashes are for
    validation, one at least, and one at least is not. Equal files of a class are on the same side.

    What cannot be read, as far as its header tells, is left out. `notes` says of all this what a user should know.
    """

    LAYOUT = "it must hold a folder for each class with the images of that class, or train/ and val/ of such folders"
    CLASS = "class folder"

    def __init__(
        self, root: Path, split: str, num_classes: int | None, *, share: float, seed: int, decoder: Decoder
    ) -> None:
        self.notes = []
        try:
            train, val = split_folders(root)
            folder = val if split == "val" and val is not None else train
            if folder is None:
                raise UserError(f"--data-path {root} holds {val.name}/, but no train/ with class folders beside it")
            names = class_folders(folder)
            self._check_folders(folder, names)
            found = files_below(folder, names)
            photos = self._readable(folder, names, found, decoder)
        except OSError as error:
            raise UserError(f"cannot list {error.filename or root}: {error.strerror}") from error
        if val is None:
            photos = self._divided(names, photos, split, share, seed)
        else:
            self.notes.append(f"{len(names)} classes, {sum(map(len, photos))} images in {folder}")
        if train != root:
            unused = [name for name in class_folders(root) if root / name not in (train, val)]
            self.notes += [f"not used: {printable(', '.join(unused))}"] if unused else []
        check_class_count(folder, len(names), num_classes, "class folders")
        super().__init__(folder, names, [label for label, each in enumerate(photos) for _ in each])
        self._paths = PackedNames(photo.path for each in photos for photo in each)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        return read_range(self._paths[index])

    def _check_folders(self, folder: Path, names: list[str]) -> None:
        """UserError for less than two classes, with what was probably meant."""
        lying = sum(is_image(entry.name) for entry in os.scandir(folder) if not entry.is_dir())
        if not names:
            instead = f"{lying} images" if lying else "neither folders nor images"
            raise UserError(f"--data-path {folder} holds {instead}, but no class folders: {self.LAYOUT}")
        if len(names) == 1:
            below = folder / names[0]
            deeper = f"; did you mean --data-path {below}?" if len(class_folders(below)) > 1 else ""
            raise UserError(f"{folder} holds one class folder, {names[0]!r}, but at least two are needed{deeper}")
        if lying:
            self.notes.append(f"left out, {lying} images that lie in {folder} itself and not in the folder of a class")

    def _readable(self, folder: Path, names: list[str], found: list[list[str]], decoder: Decoder) -> list[list[Photo]]:
        """The images of every class that can be read. UserError for a class without any."""
        files = [[path for path in paths if not is_hidden(os.path.basename(path))] for paths in found]
        images = [[path for path in paths if is_image(os.path.basename(path))] for paths in files]
        others = Counter(_suffix(path) for paths in files for path in paths if not is_image(os.path.basename(path)))
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
            self.notes.append(f"left out, no images that are read here: {printable(kinds)}")
        faults = _faults([path for paths in images for path in paths], decoder)
        reasons = Counter(faults.values()).most_common()
        for reason, count in reasons[:_MOST_NAMED]:
            named = _listed(os.path.relpath(path, folder) for path, why in faults.items() if why == reason)
            self.notes.append(f"left out, {count} that cannot be read ({printable(reason)}): {named}")
        if len(reasons) > _MOST_NAMED:
            self.notes.append(f"left out for other reasons, {sum(count for _, count in reasons[_MOST_NAMED:])}")
        kept = [[path for path in paths if path not in faults] for paths in images]
        for name, some, given in zip(names, kept, files, strict=True):
            if not some:
                why = next((f", e.g. {path}: {faults[path]}" for path in given if path in faults), "")
                what = f"holds {len(given)} files, but none is an image that can be read{why}" if given else "is empty"
                raise UserError(f"class folder {folder / name} {what}; put images into it, or remove it")
            below = sorted({os.path.relpath(path, folder / name).split(os.sep)[0] for path in some})
            if len(below) > 1 and all((folder / name / each).is_dir() for each in below):
                self.notes.append(f"class {name!r} has the images of all folders in it: {_listed(below)}")
        return [
            [Photo(path, _relative(path, folder / name), content) for path, content in zip(*each, strict=True)]
            for name, each in zip(names, zip(kept, _contents(kept), strict=True), strict=True)
        ]

    def _divided(
        self, names: list[str], photos: list[list[Photo]], split: str, share: float, seed: int
    ) -> list[list[Photo]]:
        """The part of every class that `split` means. UserError for a class that cannot be divided."""
        self._note_doubles(photos)
        parts, counts = [], []
        for name, each in zip(names, photos, strict=True):
            apart = set_apart(each, share, seed)
            if not apart:
                raise UserError(
                    f"class {name!r} has one image ({each[0].path}; copies do not count), but at least two are needed, "
                    "one to train on and one to check with: add some, or remove the folder"
                )
            sides = {"val": [photo for photo in each if photo.content in apart]}
            sides["train"] = [photo for photo in each if photo.content not in apart]
            parts.append(sides[split])
            counts.append((len(sides["train"]), len(sides["val"])))
        train, val = (sum(column) for column in zip(*counts, strict=True))
        self.notes.append(f"{len(names)} classes: {train} images to train on, {val} to validate with, set apart by")
        self.notes[-1] += f" DATA.VAL_SHARE {share:g} and SEED {seed}"
        lines = [f"  {printable(name)}: {t} + {v}" for name, (t, v) in zip(names, counts, strict=True)]
        more = len(lines) - _MOST_CLASSES_NAMED
        self.notes += [*lines[:_MOST_CLASSES_NAMED], *([f"  and {more} more"] if more > 0 else [])]
        return parts

    def _note_doubles(self, photos: list[list[Photo]]) -> None:
        places = defaultdict(dict)
        for label, each in enumerate(photos):
            for photo in each:
                places[photo.content].setdefault(label, photo.path)
        across = [" = ".join(found.values()) for found in places.values() if len(found) > 1]
        if across:
            self.notes.append(f"in several classes, so that a label is wrong, {len(across)}: {_listed(across)}")


def write_split(folder: Path, splits: dict[str, ImageSource], root: str) -> None:
    """Write split.csv into a run folder: which image of the data in `root` is for what."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("split", "class", "image"))
    for split, source in splits.items():
        for index, label in enumerate(source.targets.tolist()):
            writer.writerow((split, source.classes[label], _relative(source.name(index), root)))
    write_atomic(folder / "split.csv", text.getvalue())


def split_folders(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of the class folders to train on and of those to validate with, where all folders in `root` are those
    of splits; without the latter, the former is to be split. Else it is `root` itself that is. Raises OSError."""
    here = {name.lower(): root / name for name in class_folders(root)}
    if set(here) <= {*_TRAIN, *_VAL}:
        train, val = (
            next((here[name] for name in names if name in here and class_folders(here[name])), None)
            for names in (_TRAIN, _VAL)
        )
        if train is not None or val is not None:
            return train, val
    return root, None


def set_apart(photos: Sequence[Photo], share: float, seed: int) -> set[str]:
    """The contents that are for validation: `share` of those of a class, rounded, but one at least, and all but one at
    most; none where there is but one."""
    ranks: dict[str, bytes] = {}
    for photo in photos:
        name = f"{seed}/{photo.name}".encode("utf-8", "surrogateescape")
        ranks.setdefault(photo.content, hashlib.sha256(name).digest())
    order = sorted(ranks, key=ranks.__getitem__)
    return set(order[: min(max(1, round(share * len(order))), len(order) - 1)])


def _faults(paths: Sequence[str], decoder: Decoder) -> dict[str, str]:
    """Why images cannot be read, by path."""
    faults, clock = {}, Every(_SECONDS)
    for number, path in enumerate(paths, 1):
        reason = _fault(path, decoder)
        if reason:
            faults[path] = reason
        if clock.due():
            _log.info("looking at the photographs: %d of %d", number, len(paths))
    return faults


def _fault(path: str, decoder: Decoder) -> str:
    try:
        status = os.stat(path)
        return _fault_of(path, status.st_mtime_ns, status.st_size, decoder)
    except UNREADABLE as error:
        return getattr(error, "strerror", None) or str(error)


@functools.lru_cache(_CACHED)
def _fault_of(path: str, modified: int, size: int, decoder: Decoder) -> str:
    """`modified` and `size` are of the file that was looked at. Raises what `UNREADABLE` says."""
    with open_regular(path, follow=True) as file:
        check_size(size)
        return decoder.fault(file)


def _contents(images: Sequence[Sequence[str]]) -> list[list[str]]:
    """What tells every image from the others: see `Photo`."""
    found = {path: os.stat(path) for paths in images for path in paths}
    common = Counter(status.st_size for status in found.values())

    def content(path: str, status: os.stat_result) -> str:
        return _digest(path, status.st_mtime_ns, status.st_size) if common[status.st_size] > 1 else path

    return [[content(path, found[path]) for path in paths] for paths in images]


@functools.lru_cache(_CACHED)
def _digest(path: str, modified: int, size: int) -> str:
    return sha256_of(Path(path))


def _relative(path: str, folder: str | Path) -> str:
    """The same on all systems."""
    return os.path.relpath(path, folder).replace(os.sep, "/")


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without a suffix"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(printable, names[:_MOST_NAMED])) + more
