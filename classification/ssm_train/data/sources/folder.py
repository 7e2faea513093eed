"""Images in class folders."""

from pathlib import Path

from torchvision.datasets import ImageFolder

from ssm_train.common.errors import UserError
from ssm_train.data.sources.base import ImageSource, PackedNames, check_class_count, read_range


class FolderSource(ImageSource):
    """root/{train,val}/<class>/**/*, classes and images in the order of their names (torchvision's ImageFolder)."""

    LAYOUT = "it must hold train/<class>/*.png|jpg|... and val/<class>/*.png|jpg|..."
    CLASS = "class folder"

    def __init__(self, root: Path, split: str, num_classes: int | None) -> None:
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"--data-path {root} has no folder {split!r}; {self.LAYOUT}")
        try:
            if not any(entry.is_dir() for entry in folder.iterdir()):
                raise UserError(f"{folder} holds no class folders; --data-path {root}: {self.LAYOUT}")
            found = ImageFolder(str(folder), allow_empty=True)
        except OSError as error:
            raise UserError(f"cannot list {error.filename or folder}: {error.strerror}") from error
        filled = set(found.targets)
        empty = [name for name, target in found.class_to_idx.items() if target not in filled]
        if empty:
            more = f" (nor do {len(empty) - 1} others)" if len(empty) > 1 else ""
            raise UserError(
                f"class folder {folder / empty[0]} holds no images{more}; put images ({', '.join(found.extensions)}) "
                "into it or remove it from train and val"
            )
        check_class_count(folder, len(found.classes), num_classes, "class folders")
        super().__init__(folder, found.classes, found.targets)
        self._paths = PackedNames(path for path, _ in found.samples)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        return read_range(self._paths[index])
