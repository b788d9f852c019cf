"""Detect the encoding of a text file; refuse binary files."""

import codecs
import re
from pathlib import Path

from pipeline.errors import UserError

MAX_CONTROL_SHARE = 0.01
"""The largest share of control characters in a text file: text has next to none, a terminal recording or a compressed
file has more."""

_CHUNK_CHARACTERS = 1 << 20
_CONTROL = re.compile(r"[\x01-\x08\x0e-\x1f\x7f]")  # except \t to \r, which are white space
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def detect_encoding(path: Path) -> str:
    """Return the name of the codec that reads the whole file.

    The codec of the byte-order mark if there is one (`utf-8-sig`, `utf-16`), else `utf-8` if the bytes allow it, else
    `windows-1252`. Raises `UserError` if none of them works, or if the text contains NUL or more than
    `MAX_CONTROL_SHARE` control characters: that is a binary file.
    """
    with path.open("rb") as file:
        head = file.read(4)
    marked = [name for mark, name in _MARKS if head.startswith(mark)]
    for encoding in marked or ["utf-8", "windows-1252"]:
        try:
            characters, controls = _count(path, encoding)
        except UnicodeError:
            continue
        if controls <= MAX_CONTROL_SHARE * characters:
            return encoding
        break
    raise UserError(f"{path}: not a text file (binary data); remove it, or save it as UTF-8")


def _count(path: Path, encoding: str) -> tuple[int, int]:
    """Count all characters and the control characters of a file. Raises `UnicodeError` for NUL, as for a wrong byte."""
    characters = controls = 0
    with path.open(encoding=encoding, newline="") as text:
        while chunk := text.read(_CHUNK_CHARACTERS):
            if "\0" in chunk:
                raise UnicodeError("NUL")
            characters += len(chunk)
            controls += len(_CONTROL.findall(chunk))
    return characters, controls
