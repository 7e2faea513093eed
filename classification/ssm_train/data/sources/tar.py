"""Tar archives, whole or in shards: class folders, or WebDataset samples."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import open_regular
from ssm_train.common.image_names import SUFFIXES, is_hidden, is_image
from ssm_train.data.sources.base import (
    ImageSource,
    PackedNames,
    check_class_count,
    check_label,
    check_member,
    check_no_class_is_empty,
    find_files,
    numbered_classes,
    read_range,
)

_BLOCK = 512
_LARGEST_LABEL_BYTES = 2**20
_DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
_COMPRESSED = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"
}  # fmt: skip


class _Image(NamedTuple):
    name: str
    shard: int
    offset: int
    size: int


class TarSource(ImageSource):
    """Archives {train,val}.tar or shards train-0000.tar ..., of class folders (<class>/img.jpg) or WebDataset samples
    (key.jpg beside key.cls with a number or key.json with {"label": number}).

    The headers are walked once for the offset of every image, by the standard library, in half a minute for ImageNet's.
    The webdataset package streams shards in order, so it cannot start where a run stopped; its indexed form (wids)
    wants a JSON list of the shards with their lengths, which nobody's data has, and unpickles some extensions.

    Class folders are in the order of their names, as from a folder; samples in the order of the shards.
    """

    LAYOUT = (
        "it must hold train.tar and val.tar, or shards train-*.tar and val-*.tar, or folders train/ and val/ of them"
    )
    CLASS = "class folder"

    def __init__(self, root: Path, split: str, num_classes: int | None) -> None:
        names = ("train",) if split == "train" else ("val", "validation")
        patterns = [f"{name}{rest}" for name in names for rest in (".tar", "[-_]*.tar", "/*.tar")]
        patterns += [f"*[-_]{name}[-_]*.tar" for name in names]
        for name in names:
            for suffix, tool in {"tar.gz": "gunzip", "tgz": "gunzip", "tar.bz2": "bunzip2", "tar.xz": "unxz"}.items():
                if (root / f"{name}.{suffix}").is_file():
                    raise _compressed(root / f"{name}.{suffix}", tool)
        shards = find_files(root, patterns, self.LAYOUT)
        where = shards[0] if len(shards) == 1 else shards[0].parent
        images: list[_Image] = []
        labels: dict[tuple[int, str], int | None] = {}
        for number, path in enumerate(shards):
            _walk(path, number, images, labels)
        if not images:
            raise UserError(f"{where} holds no images ({', '.join(SUFFIXES)})")
        if any(_key(image) in labels for image in images):
            targets = _sample_labels(images, labels, shards, num_classes)
            classes = numbered_classes(targets, num_classes)
        else:
            images, classes, targets = _class_folders(images, shards, names)
            check_class_count(where, len(classes), num_classes, "class folders")
        super().__init__(where, classes, targets)
        self._shards = shards
        self._names = PackedNames(image.name for image in images)
        self._where = np.array([image[1:] for image in images], np.int64)
        check_no_class_is_empty(self)

    def name(self, index: int) -> str:
        return f"{self._shards[self._where[index, 0]]}@/{self._names[index]}"

    def read(self, index: int) -> bytes:
        shard, offset, size = self._where[index].tolist()
        return read_range(self._shards[shard], offset, size)


def _walk(path: Path, number: int, images: list[_Image], labels: dict[tuple[int, str], int | None]) -> None:
    """Add the images of shard `number` to `images`, and its labels (None for one that is no integer) to `labels`."""
    for name, offset, size in _members(path):
        pure = PurePosixPath(name)
        if any(map(is_hidden, pure.parts)):
            continue
        if is_image(pure.name):
            images.append(_Image(str(pure), number, offset, size))
        elif pure.suffix in (".cls", ".json"):
            image = _Image(str(pure), number, offset, size)
            if pure.suffix == ".cls" or _key(image) not in labels:
                labels[_key(image)] = _read_label(path, image)


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the files in an archive. Raises UserError for anything but plain files and folders."""
    try:
        with open_regular(path, follow=True) as file:
            start = file.read(8)
            for magic, tool in _COMPRESSED.items():
                if start.startswith(magic):
                    raise _compressed(path, tool)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # it would keep an object for every file
                    check_member(member.name, path)
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse() or member.size < 0:
                        raise UserError(
                            f"{path} is refused: its member {member.name!r} is a link, a device or a sparse file; "
                            "make the archive again with plain files (tar --dereference)"
                        )
                    yield member.name, member.offset_data, member.size
                # tarfile takes a damaged header for the end
                file.seek(archive.offset)
                end = file.read(_BLOCK)
        if len(end) < _BLOCK or end.strip(b"\0"):
            raise ValueError(f"no end mark and no valid header at byte {archive.offset}")
    except _DAMAGED as error:
        raise UserError(f"{path} is damaged or no tar archive ({error}): download or make it again") from error


def _compressed(path: Path, tool: str) -> UserError:
    return UserError(
        f"{path} is compressed, so its images cannot be read one by one: unpack the archive itself ({tool} {path}), "
        "not what is in it"
    )


def _key(image: _Image) -> tuple[int, str]:
    """What the members of a WebDataset sample share: shard, and the path up to the first dot of its last part."""
    folder, slash, base = image.name.rpartition("/")
    return image.shard, folder + slash + base.partition(".")[0]


def _read_label(path: Path, member: _Image) -> int | None:
    if member.size > _LARGEST_LABEL_BYTES:
        return None
    try:
        content = json.loads(read_range(path, member.offset, member.size))
    except (ValueError, RecursionError):
        return None
    label = content.get("label") if isinstance(content, dict) else content
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _sample_labels(
    images: list[_Image], labels: dict[tuple[int, str], int | None], shards: list[Path], num_classes: int | None
) -> list[int]:
    """One label for every image, one image for every label. Raises UserError."""
    targets = []
    for image in images:
        where = f"{shards[image.shard]}@/{image.name}"
        if _key(image) not in labels:
            raise UserError(
                f'{where} has no label: every image needs a key.cls, or a key.json with {{"label": number}}'
            )
        label = labels[_key(image)]
        if label is None:
            raise UserError(f'the label of {where} is no number: key.cls holds one, or key.json {{"label": number}}')
        targets.append(check_label(label, num_classes, where))
    alone = labels.keys() - {_key(image) for image in images}
    if alone:
        shard, key = min(alone)
        raise UserError(f"{shards[shard]}: sample {key!r} has a label, but no image ({', '.join(SUFFIXES)})")
    return targets


def _class_folders(
    images: list[_Image], shards: list[Path], splits: tuple[str, ...]
) -> tuple[list[_Image], list[str], list[int]]:
    """Images in a folder's order, class names and labels. A folder train/ or val/ around all classes is left out."""
    parts = [image.name.split("/") for image in images]
    skip = 1 if all(len(part) > 2 and part[0] in splits for part in parts) else 0
    for image, part in zip(images, parts, strict=True):
        if len(part) < skip + 2:
            raise UserError(
                f"{shards[image.shard]}@/{image.name} is in no class folder: members must be <class>/img.jpg, or "
                "WebDataset samples key.jpg, key.cls"
            )
    order = sorted(
        range(len(images)), key=lambda i: (parts[i][skip], "/".join(parts[i][:-1]), parts[i][-1], images[i].shard)
    )
    classes = sorted({part[skip] for part in parts})
    label_of = {name: label for label, name in enumerate(classes)}
    return [images[i] for i in order], classes, [label_of[parts[i][skip]] for i in order]
