"""Parquet files in the layout of Hugging Face's image data sets."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssm_train.common.errors import UserError
from ssm_train.data.sources.base import (
    ImageSource,
    check_class_count,
    check_label,
    check_no_class_is_empty,
    check_size,
    find_files,
    numbered_classes,
)

_LARGEST_GROUP_BYTES = 2**30


class ParquetSource(ImageSource):
    """train*.parquet and val*.parquet (or validation*, test*), here or in data/, with the columns image: struct{bytes,
    path} and label: integer. Class names come from the files' Hugging Face metadata, where there are any.

    Read by pyarrow, the smallest unit being a row group, of which each process keeps the last. Hugging Face writes 100
    images per group; for shuffled reading write them again with 8, which is seven times as light (1.4 instead of 9 ms
    for an image of 114 kB, beside 6 ms of decoding), or hold them in RAM (DATA.CACHE_MODE). The `datasets` package
    needs no such care, but unpacks a second copy of all data into its cache first.
    """

    LAYOUT = "it must hold train*.parquet and val*.parquet (or validation*, test*), itself or in data/"

    def __init__(self, root: Path, split: str, num_classes: int | None) -> None:
        splits = ("train",) if split == "train" else ("val", "validation", "test")
        patterns = [f"{folder}{name}[-_.]*parquet" for name in splits for folder in ("", "data/")]
        files = find_files(root, patterns, self.LAYOUT)
        where = files[0] if len(files) == 1 else files[0].parent
        labels, groups, classes = [], [], None
        for number, path in enumerate(files):
            new_labels, sizes, names = _scan(path)
            if number and names != classes:
                raise UserError(f"{path} has other class names than {files[0]}: use files of one data set")
            classes = names
            for row in (new_labels.argmin(), new_labels.argmax()) if len(new_labels) else ():
                check_label(int(new_labels[row]), num_classes, f"{path} row {row}")
            labels.append(new_labels)
            groups += [(number, group, size) for group, size in enumerate(sizes)]
        if classes is not None:
            check_class_count(where, len(classes), num_classes, "classes")
        targets = np.concatenate(labels)
        super().__init__(where, classes or numbered_classes(targets, num_classes), targets)
        self._files = files
        self._groups = np.array(groups, np.int64).reshape(-1, 3)  # file, row group in it, rows
        self._starts = np.cumsum([0, *self._groups[:, 2]])  # of the groups, as an index of all images
        self._held = (-1, None)
        check_no_class_is_empty(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": (-1, None)}

    def name(self, index: int) -> str:
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        file = self._groups[place, 0]
        first = self._starts[np.searchsorted(self._groups[:, 0], file)]
        return f"{self._files[file]} row {index - first}"

    def read(self, index: int) -> bytes:
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._held[0] != place:
            file, group, _ = self._groups[place].tolist()
            self._held = (place, _read_group(self._files[file], group))
        data = self._held[1][index - int(self._starts[place])].as_py()
        if data is None:
            raise ValueError("the column image.bytes is empty here")
        check_size(len(data))
        return data


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("DATA.DATASET parquet needs the package pyarrow: pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


def _scan(path: Path) -> tuple[np.ndarray, list[int], list[str] | None]:
    """Labels (n,) int64, rows of each row group, and the class names, if any. Raises UserError."""
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(pa, path, file.schema_arrow)
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
            column = file.read(columns=["label"], use_threads=False).column("label")
            metadata = file.schema_arrow.metadata or {}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no parquet file ({error}): download or make it again") from error
    if column.null_count:
        raise UserError(f"{path} row {column.is_null().to_pylist().index(True)} has no label")
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > _LARGEST_GROUP_BYTES:
        raise UserError(
            f"{path} has a row group of {largest / 2**20:.0f} MB, all of which must be read for one image: write it "
            "again with small groups (pyarrow.parquet.write_table(table, path, row_group_size=8))"
        )
    rows = [group.num_rows for group in groups]
    return column.to_numpy().astype(np.int64), rows, _class_names(metadata.get(b"huggingface"))


def _check_columns(pa: ModuleType, path: Path, schema: Any) -> None:
    def binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    image = schema.field("image").type if "image" in schema.names else None
    has_bytes = image is not None and pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
    has_label = "label" in schema.names and pa.types.is_integer(schema.field("label").type)
    if not (has_bytes and binary(image.field("bytes").type) and has_label):
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise UserError(f"{path} must have columns image: struct<bytes, path> and label: integer, not {columns}")


def _class_names(metadata: bytes | None) -> list[str] | None:
    """The names of the ClassLabel in the metadata that the datasets package writes; None without such."""
    try:
        names = json.loads(metadata or b"{}")["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return [str(name) for name in names]


def _read_group(path: Path, group: int) -> Any:
    """The bytes column of a row group. Raises OSError or ValueError."""
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            images = file.read_row_group(group, columns=["image.bytes"], use_threads=False).column("image")
            return images.flatten()[0]
    except pa.ArrowException as error:
        raise ValueError(f"the parquet file is damaged here: {error}") from error
