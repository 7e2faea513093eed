"""JSON lists of images, as ImageNet-22K comes."""

import json
from pathlib import Path

from ssm_train.common.errors import UserError
from ssm_train.data.sources.base import (
    ImageSource,
    PackedNames,
    check_label,
    check_member,
    find_files,
    numbered_classes,
    read_range,
)


class ImageListSource(ImageSource):
    """{train,val}.json or *_map_{train,val}.txt, holding [["path", label], ...] with paths relative to DATA_PATH.

    Not every class needs an image, as in ImageNet-22K. Whether the files exist shows when they are read.
    """

    LAYOUT = 'it must hold train.json and val.json (or *_map_train.txt, *_map_val.txt) with [["path", label], ...]'

    def __init__(self, root: Path, split: str, num_classes: int | None) -> None:
        path, *others = find_files(root, (f"{split}.json", f"*_map_{split}.txt"), self.LAYOUT)
        if others:
            raise UserError(f"--data-path {root} has both {path.name} and {others[0].name}: remove one")
        try:
            entries = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path} as JSON ({error}): download or make it again") from error
        if not isinstance(entries, list) or not entries:
            raise UserError(f'{path} must be a list [["path", label], ...] that is not empty')
        targets = []
        for number, entry in enumerate(entries):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
                raise UserError(f'{path} entry {number} is {str(entry)[:80]}, but it must be ["path", label]')
            check_member(entry[0], path)
            targets.append(check_label(entry[1], num_classes, f"{path} entry {number}"))
        super().__init__(path, numbered_classes(targets, num_classes), targets)
        self._folder, self._names = root, PackedNames(name for name, _ in entries)

    def name(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def read(self, index: int) -> bytes:
        return read_range(self._folder / self._names[index])
