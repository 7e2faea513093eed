"""Images in class folders."""

import os
from collections.abc import Iterator
from pathlib import Path

from ssm_train.common.errors import UserError
from ssm_train.common.image_names import SUFFIXES, is_hidden, is_image
from ssm_train.data.sources.base import ImageSource, PackedNames, check_class_count, read_range


class FolderSource(ImageSource):
    """root/{train,val}/<class>/**/*, classes and images in the order of their names, as torchvision's ImageFolder has
    them. Hidden folders and files are none. Links are followed, but no folder is entered twice: a link to a parent or
    to another class adds nothing."""

    LAYOUT = "it must hold train/<class>/*.png|jpg|... and val/<class>/*.png|jpg|..."
    CLASS = "class folder"

    def __init__(self, root: Path, split: str, num_classes: int | None) -> None:
        folder = root / split
        if not folder.is_dir():
            raise UserError(
                f"--data-path {root} has no folder {split!r}; {self.LAYOUT}; or, to have it split, one folder for each "
                "class: --dataset photos"
            )
        try:
            classes = class_folders(folder)
            if not classes:
                raise UserError(f"{folder} holds no class folders; --data-path {root}: {self.LAYOUT}")
            files = files_below(folder, classes)
        except OSError as error:
            raise UserError(f"cannot list {error.filename or folder}: {error.strerror}") from error
        images = [[path for path in paths if is_image(os.path.basename(path))] for paths in files]
        empty = [name for name, paths in zip(classes, images, strict=True) if not paths]
        if empty:
            more = f" (nor do {len(empty) - 1} others)" if len(empty) > 1 else ""
            raise UserError(
                f"class folder {folder / empty[0]} holds no images{more}; put images ({', '.join(SUFFIXES)}) "
                "into it or remove it from train and val"
            )
        check_class_count(folder, len(classes), num_classes, "class folders")
        super().__init__(folder, classes, [label for label, paths in enumerate(images) for _ in paths])
        self._paths = PackedNames(path for paths in images for path in paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        return read_range(self._paths[index])


def class_folders(folder: str | Path) -> list[str]:
    """The names of the folders in `folder`, sorted, hidden ones left out. Raises OSError."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def files_below(folder: Path, classes: list[str]) -> list[list[str]]:
    """The paths of the files below every class folder, sorted. Raises OSError for what cannot be listed."""
    entered = {_identity(folder), *(_identity(folder / name) for name in classes)}
    return [
        [os.path.join(place, name) for place, names in sorted(_walk(str(folder / each), entered)) for name in names]
        for each in classes
    ]


def _walk(top: str, entered: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files, sorted) of `top` and of the folders below it that are not hidden and that nobody has entered
    before."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(top, followlinks=True, onerror=fail):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if place != top:
            identity = _identity(place)
            if identity in entered:
                folders.clear()
                continue
            entered.add(identity)
        yield place, sorted(names)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
