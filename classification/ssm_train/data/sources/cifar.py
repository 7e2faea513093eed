"""CIFAR-10 and CIFAR-100 in their binary version: the python version is pickles, which can run programs."""

from pathlib import Path

import numpy as np
from PIL import Image

from ssm_train.common.errors import UserError
from ssm_train.data.sources.base import (
    ImageSource,
    check_class_count,
    check_label,
    check_no_class_is_empty,
    read_range,
)

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


class CifarSource(ImageSource):
    """Records of label bytes (the last one counts) and 3072 bytes, (3, 32, 32). "val" is the data set's test part."""

    LAYOUT: str
    FOLDER: str
    PICKLES: str
    FILES: dict[str, tuple[str, ...]]
    NAMES: str
    LABEL_BYTES: int

    def __init__(self, root: Path, split: str, num_classes: int | None) -> None:
        folder = root / self.FOLDER if (root / self.FOLDER).is_dir() else root
        files = [folder / name for name in self.FILES[split]]
        for path in files:
            if not path.is_file():
                has_pickles = (root / self.PICKLES).is_dir() or (root / path.stem).is_file()
                why = ", only the python version: pickles, which are never executed" if has_pickles else ""
                raise UserError(f"--data-path {root} has no {path.name}{why}; {self.LAYOUT}")
        try:
            names = (folder / self.NAMES).read_text().split()
            contents = [np.fromfile(path, np.uint8) for path in files]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {folder}: {error}; {self.LAYOUT}") from error
        check_class_count(folder, len(names), num_classes, "classes")
        labels = []
        record = self.LABEL_BYTES + _PIXELS
        for path, content in zip(files, contents, strict=True):
            if len(content) == 0 or len(content) % record:
                raise UserError(f"{path} is damaged: its size is no multiple of {record} bytes; download it again")
            labels.append(content.reshape(-1, record)[:, self.LABEL_BYTES - 1].astype(np.int64))
            largest = int(labels[-1].argmax())
            check_label(int(labels[-1][largest]), len(names), f"{path} record {largest}")
        super().__init__(folder, names, np.concatenate(labels))
        self._files = files
        self._starts = np.cumsum([0, *map(len, labels)])
        check_no_class_is_empty(self)

    def _place(self, index: int) -> tuple[Path, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[number], index - int(self._starts[number])

    def name(self, index: int) -> str:
        path, record = self._place(index)
        return f"{path} record {record}"

    def read(self, index: int) -> bytes:
        path, record = self._place(index)
        return read_range(path, record * (self.LABEL_BYTES + _PIXELS) + self.LABEL_BYTES, _PIXELS)

    def decode(self, data: bytes) -> Image.Image:
        planes = np.frombuffer(data, np.uint8).reshape(3, _SIDE, _SIDE)
        return self.decoder.converted(Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))))


class Cifar10Source(CifarSource):
    FOLDER, PICKLES, NAMES, LABEL_BYTES = "cifar-10-batches-bin", "cifar-10-batches-py", "batches.meta.txt", 1
    FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "val": ("test_batch.bin",)}
    LAYOUT = "it must hold cifar-10-batches-bin/ of cifar-10-binary.tar.gz, from www.cs.toronto.edu/~kriz/cifar.html"


class Cifar100Source(CifarSource):
    FOLDER, PICKLES, NAMES, LABEL_BYTES = "cifar-100-binary", "cifar-100-python", "fine_label_names.txt", 2
    FILES = {"train": ("train.bin",), "val": ("test.bin",)}
    LAYOUT = "it must hold cifar-100-binary/ of cifar-100-binary.tar.gz, from www.cs.toronto.edu/~kriz/cifar.html"
