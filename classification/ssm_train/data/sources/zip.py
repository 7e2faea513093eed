"""Zip archives with map files, as Swin and VMamba read them."""

import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import open_regular
from ssm_train.data.sources.base import (
    ImageSource,
    PackedNames,
    check_label,
    check_member,
    check_no_class_is_empty,
    check_size,
    numbered_classes,
)

_DAMAGED = (zipfile.BadZipFile, OSError, EOFError, ValueError, struct.error, NotImplementedError, OverflowError)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_ENCRYPTED = 1


class ZipSource(ImageSource):
    """{train,val}.zip with {train,val}_map.txt, whose lines are "path in the archive<TAB>label".

    The archive's directory is read once, and of each image five numbers are kept: a ZipFile per worker would read a
    directory of a million entries, and hold a gigabyte of objects, again in each.
    """

    LAYOUT = 'it must hold train.zip, val.zip, and train_map.txt, val_map.txt with lines "path/in/zip<TAB>label"'

    def __init__(self, root: Path, split: str, num_classes: int | None) -> None:
        archive, map_file = root / f"{split}.zip", root / f"{split}_map.txt"
        for path in (archive, map_file):
            if not path.is_file():
                raise UserError(f"--data-path {root} has no {path.name}; {self.LAYOUT}")
        members = _members(archive)
        names, targets = _read_map(map_file, num_classes)
        for name in names:
            if name not in members:
                raise UserError(f"{map_file} lists {name!r}, which is not in {archive}: make both from the same tree")
        super().__init__(archive, numbered_classes(targets, num_classes), targets)
        self._names = PackedNames(names)
        self._where = np.array([members[name] for name in names], np.int64)
        check_no_class_is_empty(self)

    def name(self, index: int) -> str:
        return f"{self.root}@/{self._names[index]}"

    def read(self, index: int) -> bytes:
        offset, packed, size, checksum, method = self._where[index].tolist()
        check_size(max(packed, size))
        with open_regular(self.root, follow=True) as file:
            file.seek(offset)
            header = file.read(_LOCAL_HEADER.size)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            if signature != b"PK\x03\x04":
                raise ValueError("the zip archive is damaged here: no header before the image")
            file.seek(name_length + extra_length, 1)
            data = file.read(packed)
        if method == zipfile.ZIP_DEFLATED:
            # one more than announced shows an image that is larger, without unpacking all of it
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ValueError("the zip archive is damaged here: length or checksum differ")
        return data


def _members(archive: Path) -> dict[str, tuple[int, int, int, int, int]]:
    """path -> (offset of its header, packed size, size, CRC-32, compression method). Raises UserError."""
    try:
        with open_regular(archive, follow=True) as raw, zipfile.ZipFile(raw) as file:
            entries = file.infolist()
    except _DAMAGED as error:
        raise UserError(f"{archive} is damaged or no zip archive ({error}): download or make it again") from error
    members = {}
    for entry in entries:
        check_member(entry.filename, archive)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{archive} is refused: its member {entry.filename!r} is a link or a device, not a file")
        if entry.is_dir():
            continue
        if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{archive}: member {entry.filename!r} is encrypted or compressed by another method than deflate: make "
                f"the archive again (zip -r -0 {archive.name} FOLDER)"
            )
        members[entry.filename] = (
            entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, entry.compress_type
        )  # fmt: skip
    return members


def _read_map(path: Path, num_classes: int | None) -> tuple[list[str], list[int]]:
    names, targets = [], []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, tab, label = line.strip().partition("\t")
        if not tab or not name:
            raise UserError(f'{path} line {number} is {line[:80]!r}, but it must be "path<TAB>label"')
        names.append(name.removeprefix("./"))
        label = int(label) if label.isascii() and label.isdigit() and len(label) < 10 else label
        targets.append(check_label(label, num_classes, f"{path} line {number}"))
    if not names:
        raise UserError(f'{path} lists no images; its lines must be "path<TAB>label"')
    return names, targets
