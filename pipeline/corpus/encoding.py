"""Detect the encoding of a text file; refuse binary files and files with damaged bytes."""

import codecs
import re
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError

MAX_CONTROL_SHARE = 0.01
"""The largest share of control characters in a text file: text has next to none, a terminal recording or a compressed
file has more."""

_CHUNK_CHARACTERS = 1 << 20
_CONTROL = re.compile(r"[\x01-\x08\x0e-\x1f\x7f]")  # except \t to \r, which are white space
_BAD = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are wrong
_WIDE = re.compile("[^\0-\x7f\udc80-\udcff]")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class _Counts(NamedTuple):
    characters: int
    controls: int
    wide: int
    """The characters beyond ASCII."""
    bad: int
    """The bytes that are no character."""


def detect_encoding(path: Path) -> str:
    """Return the name of the codec that reads the whole file.

    The codec of the byte-order mark if there is one (`utf-8-sig`, `utf-16`), else `windows-1252` if more bytes are
    wrong in UTF-8 than characters beyond ASCII are right, else `utf-8`. Raises `UserError` if the text contains NUL or
    more than `MAX_CONTROL_SHARE` control characters, which means that the file is binary, or if the codec cannot read a
    byte, naming its line.
    """
    with path.open("rb") as file:
        head = file.read(4)
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    try:
        counts = _count(path, encoding)
        if encoding == "utf-8" and counts.bad > counts.wide:
            encoding = "windows-1252"
            counts = _count(path, encoding)
        is_text = counts.controls <= MAX_CONTROL_SHARE * counts.characters
    except UnicodeError:
        is_text = False
    if not is_text:
        raise UserError(f"{path}: not a text file (binary data); remove it, or save it as UTF-8")
    if counts.bad:
        raise UserError(_name_bad_byte(path, encoding))
    return encoding


def _count(path: Path, encoding: str) -> _Counts:
    """Count the characters of a file. Raises `UnicodeError` for NUL, and for bad UTF-16."""
    counts = _Counts(0, 0, 0, 0)
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    with path.open(encoding=encoding, errors=errors, newline="") as text:
        while chunk := text.read(_CHUNK_CHARACTERS):
            if "\0" in chunk:
                raise UnicodeError("NUL")
            found = (len(chunk), *(len(kind.findall(chunk)) for kind in (_CONTROL, _WIDE, _BAD)))
            counts = _Counts(*map(sum, zip(counts, found, strict=True)))
    return counts


def _name_bad_byte(path: Path, encoding: str) -> str:
    """Return the error that names the first byte that the codec (not UTF-16) cannot read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                fault = "neither UTF-8 nor Windows-1252" if encoding == "windows-1252" else "not UTF-8"
                return (
                    f"{path}:{number}: byte {error.start + 1} of the line, {line[error.start]:#04x}, is {fault}; "
                    "correct it, or save the file as UTF-8"
                )
    raise ValueError(f"{path}: all bytes are {encoding}")
