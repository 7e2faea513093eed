"""What a file is that holds no weights, by its first bytes: usually what a download left in place of a checkpoint."""

from __future__ import annotations

import io

_HEAD = 512
_KINDS = [
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself: run git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it first"),
    (b"(\xb5/\xfd", "compressed with zstd: unpack it first"),
    (b"Rar!", "a rar archive: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file, such as Keras writes"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF", "a PDF document"),
]
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head")


def foreign_kind(file: io.BufferedIOBase, suffix: str) -> str:
    """What a `file` named `*suffix` is, if it cannot be a checkpoint of this kind, else ""; leaves it at its start."""
    head = file.read(_HEAD)
    file.seek(0)
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return "nothing but zeros, as an interrupted copy leaves"
    for magic, kind in _KINDS:
        if head.startswith(magic):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_MARKUP):
        return "a web page, not the file itself: download it again"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    # a safetensors header is preceded by its length
    safetensors = head[8:9] == b"{"
    if safetensors and suffix != ".safetensors":
        return "a safetensors file: give it the ending .safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\x0a")) and suffix == ".safetensors":
        return "a file of torch.save: give it the ending .pth"
    if not safetensors and _is_text(head):
        return "a text file, not weights"
    return ""


def _is_text(head: bytes) -> bool:
    return all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head)
