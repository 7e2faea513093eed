"""The two formats of `torch.save`: a pickle of names and numbers, and the storages, which hold the bytes of tensors.

    zip (PyTorch 1.6 and later)   NAME/data.pkl, NAME/data/<key>, ...    uncompressed entries with checksums
    legacy                        5 pickles: a magic number, a version, facts of the machine, the values, the keys of
                                  the storages; then for each key its number of elements (int64) and its bytes

Sizes in a file are compared with the file before anything of that size is made.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pickle_machine import Bounded, Call, Malformed, Name, Refused, run

_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_ENTRIES = 1 << 16
_CHUNK = 1 << 24
# of a zip entry: a signature, what its directory says as well, and the lengths of name and extra field before the bytes
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Storage(NamedTuple):
    """What the pickle says of a storage."""

    key: str
    dtype: torch.dtype | None
    """None for bytes without a type."""
    count: int
    """Elements, or bytes."""

    @property
    def nbytes(self) -> int:
        return self.count * (self.dtype.itemsize if self.dtype else 1)


# what makes a value of a pickle, given the calls that its names stand for
Unpickle = Callable[[dict[str, Call | None]], Any]


class TorchFile(NamedTuple):
    """An open file."""

    unpickle: Unpickle
    """Can be called again, for the same values out of other calls."""
    fill: Callable[[Storage], Tensor]
    """The bytes of a storage, uint8 [nbytes]; when `unpickle` has been called."""


@contextmanager
def open_torch_file(file: io.BufferedIOBase) -> Iterator[TorchFile]:
    """Raises Malformed and Refused, and so do the functions given."""
    bounded = Bounded(file)
    if file.read(4) != b"PK\x03\x04":
        file.seek(0)
        yield _Legacy(file, bounded).opened()
        return
    try:
        with zipfile.ZipFile(bounded) as archive:
            yield _Zip(archive, file, bounded.size).opened()
    except (Malformed, Refused):
        raise
    # what zipfile raises for archives that are damaged, encrypted or of another kind
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise Malformed(f"its zip archive is broken: {error}") from error
    except (ValueError, LookupError, OverflowError) as error:
        raise Malformed(f"its zip archive is broken ({type(error).__name__})") from error


def _storage(identity: Any) -> Storage:
    """Of a persistent id: ("storage", a class, key, device, count), and None after it in the legacy format."""
    match identity:
        case ("storage", Name(kind), str(key), str(), int(count)) | (
            "storage",
            Name(kind),
            str(key),
            str(),
            int(count),
            None,
        ) if kind in STORAGES and count >= 0:
            return Storage(key, STORAGES[kind], count)
    raise Malformed("its pickle refers to something else than a storage")


def _storage_kinds() -> dict[str, torch.dtype | None]:
    """Element types by the name of the storage class; complex and quantized ones among them."""
    kinds = {
        f"torch.{kind}Storage": getattr(torch, dtype)
        for kind, dtype in {
            **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
            **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
            **{"ComplexDouble": "complex128", "ComplexFloat": "complex64"},
            **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32"},
        }.items()
    }
    return {**kinds, "torch.storage.UntypedStorage": None}


STORAGES = _storage_kinds()


class _Zip:
    def __init__(self, archive: zipfile.ZipFile, file: io.BufferedIOBase, size: int) -> None:
        self._file = file
        entries = archive.infolist()
        names = {entry.filename: entry for entry in entries}
        if len(names) < len(entries) or len(entries) > _MAX_ENTRIES:
            raise Malformed("its zip archive has entries twice, or too many")
        if any(name.endswith("/constants.pkl") for name in names):
            raise Refused("a TorchScript program")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise Refused(f"the compressed entry {entry.filename}")
        if not all(0 <= entry.header_offset < size for entry in entries):
            raise Malformed("its zip archive has entries outside of the file")
        if sum(entry.file_size for entry in entries) > size:
            raise Malformed("its zip archive has entries that share their bytes")
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise Malformed("its zip archive is not one of torch.save: it has no data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in names and self._read(names[f"{self._root}byteorder"]) != b"little":
            raise Refused("numbers in the byte order of another machine")
        self._entries = names
        self._pickle = self._read(names[pickles[0]])

    def opened(self) -> TorchFile:
        return TorchFile(lambda calls: run(io.BytesIO(self._pickle), calls, self._find), self._fill)

    def _find(self, identity: Any) -> Storage:
        storage = _storage(identity)
        entry = self._entries.get(f"{self._root}data/{storage.key}")
        if entry is None or entry.file_size != storage.nbytes:
            there = "no bytes" if entry is None else f"{entry.file_size} bytes"
            raise Malformed(f"it has {there} for storage {storage.key} of {storage.nbytes}")
        return storage

    def _fill(self, storage: Storage) -> Tensor:
        return self._bytes(self._entries[f"{self._root}data/{storage.key}"])

    def _read(self, entry: zipfile.ZipInfo) -> bytes:
        return self._bytes(entry).numpy().tobytes()

    def _bytes(self, entry: zipfile.ZipInfo) -> Tensor:
        """Straight from the file, as entries are not compressed: zipfile would copy them twice."""
        self._file.seek(entry.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise Malformed(f"its zip archive has no header before {entry.filename}")
        self._file.seek(sum(_LOCAL_HEADER.unpack(header)[1:]), io.SEEK_CUR)
        filled = _filled(self._file, entry.file_size)
        if zlib.crc32(filled.numpy()) != entry.CRC:
            raise Malformed(f"its zip archive is broken: Bad CRC-32 for {entry.filename}")
        return filled


class _Legacy:
    def __init__(self, file: io.BufferedIOBase, bounded: Bounded) -> None:
        self._file, self._bounded = file, bounded
        if self._plain() != _MAGIC:
            raise Malformed("it does not begin as a file of torch.save")
        if self._plain() != 1001:
            raise Refused("another version of the format")
        machine = self._plain()
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise Refused("numbers in the byte order of another machine")
        self._start = file.tell()
        self._places: dict[str, int] | None = None

    def opened(self) -> TorchFile:
        return TorchFile(self._unpickle, self._fill)

    def _plain(self) -> Any:
        return run(self._bounded, {}, _storage)

    def _unpickle(self, calls: dict[str, Call | None]) -> Any:
        storages: dict[str, Storage] = {}

        def find(identity: Any) -> Storage:
            storage = _storage(identity)
            if storages.setdefault(storage.key, storage) != storage:
                raise Malformed(f"its storage {storage.key} has two sizes")
            return storage

        self._file.seek(self._start)
        value = run(self._bounded, calls, find)
        if self._places is None:
            self._places = self._locate(storages)
        return value

    def _locate(self, storages: dict[str, Storage]) -> dict[str, int]:
        """Where the bytes of the storages begin."""
        keys = self._plain()
        if (
            not isinstance(keys, list)
            or not all(isinstance(key, str) for key in keys)
            or sorted(keys) != sorted(storages)
        ):
            raise Malformed("its list of storages is not that of its tensors")
        places, place = {}, self._file.tell()
        for key in keys:
            self._file.seek(place)
            count = int.from_bytes(self._file.read(8), "little", signed=True)
            places[key], place = place + 8, place + 8 + storages[key].nbytes
            if count != storages[key].count or place > self._bounded.size:
                raise Malformed(f"it has not the {storages[key].nbytes} bytes of storage {key}")
        return places

    def _fill(self, storage: Storage) -> Tensor:
        before = self._file.tell()
        self._file.seek(self._places[storage.key])
        filled = _filled(self._file, storage.nbytes)
        self._file.seek(before)
        return filled


def _filled(stream: io.BufferedIOBase, size: int) -> Tensor:
    """The next `size` bytes, uint8 [size], which the file is known to have."""
    bytes_ = torch.empty(size, dtype=torch.uint8)
    view = memoryview(bytes_.numpy())
    done = 0
    while done < size:
        count = stream.readinto(view[done : done + _CHUNK])
        if not count:
            raise Malformed("it ends early")
        done += count
    return bytes_
