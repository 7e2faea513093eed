"""Text from files and file names, for messages: one line, whatever is in it."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with every character that is not printable written as an escape: line ends, the sequences that move a
    terminal's cursor, and the bytes of file names that are no UTF-8."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape", "surrogatepass").decode()
