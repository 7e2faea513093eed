"""Images in class folders."""

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from ssm_train.common.errors import UserError
from ssm_train.data.sources.base import ImageSource, PackedNames, check_class_count, read_range


class FolderSource(ImageSource):
    """root/{train,val}/<class>/**/*, classes and images in the order of their names, as torchvision's ImageFolder has
    them. Links are followed, but no folder is entered twice: a link to a parent or to another class adds nothing."""

    LAYOUT = "it must hold train/<class>/*.png|jpg|... and val/<class>/*.png|jpg|..."
    CLASS = "class folder"

    def __init__(self, root: Path, split: str, num_classes: int | None) -> None:
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"--data-path {root} has no folder {split!r}; {self.LAYOUT}")
        try:
            classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            if not classes:
                raise UserError(f"{folder} holds no class folders; --data-path {root}: {self.LAYOUT}")
            images = _images(folder, classes)
        except OSError as error:
            raise UserError(f"cannot list {error.filename or folder}: {error.strerror}") from error
        empty = [name for name, paths in zip(classes, images, strict=True) if not paths]
        if empty:
            more = f" (nor do {len(empty) - 1} others)" if len(empty) > 1 else ""
            raise UserError(
                f"class folder {folder / empty[0]} holds no images{more}; put images ({', '.join(IMG_EXTENSIONS)}) "
                "into it or remove it from train and val"
            )
        check_class_count(folder, len(classes), num_classes, "class folders")
        super().__init__(folder, classes, [label for label, paths in enumerate(images) for _ in paths])
        self._paths = PackedNames(path for paths in images for path in paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        return read_range(self._paths[index])


def _images(folder: Path, classes: list[str]) -> list[list[str]]:
    """The paths of the images of every class, sorted. Raises OSError for what cannot be listed."""
    entered = {_identity(folder), *(_identity(folder / name) for name in classes)}
    return [
        [
            os.path.join(place, name)
            for place, names in sorted(_walk(str(folder / each), entered))
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS)
        ]
        for each in classes
    ]


def _walk(top: str, entered: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files, sorted) of `top` and of the folders below it that nobody has entered before."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(top, followlinks=True, onerror=fail):
        if place != top:
            identity = _identity(place)
            if identity in entered:
                folders.clear()
                continue
            entered.add(identity)
        folders.sort()
        yield place, sorted(names)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
