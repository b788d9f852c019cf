"""Detect the encoding of a text file; refuse binary files, damaged bytes, and guesses that are not certain."""

import codecs
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import charset_normalizer
import numpy as np
from charset_normalizer import CharsetMatch

from pipeline.errors import UserError

MAX_CONTROL_SHARE = 0.01
"""The largest share of control characters in a text file: text has next to none, a terminal recording or a compressed
file has more."""
PAGES = (
    *("windows-1252", "windows-1250", "windows-1251", "windows-1253", "windows-1254", "windows-1255", "windows-1256"),
    *("iso-8859-2", "iso-8859-5", "iso-8859-7", "koi8-r", "koi8-u", "cp866", "cp874"),
    *("cp932", "euc-jp", "gb18030", "cp950", "cp949"),
)
"""The code pages that are detected. Of two that read the text alike, the first is taken."""
RIVALS = "windows-1257", "mac-roman", "mac-cyrillic", "cp850", "cp852", "cp855"
"""The code pages that make a guess uncertain and are never taken: more files look like them than have them."""

_CHUNK_CHARACTERS = 1 << 20
_CONTROL = re.compile(r"[\x01-\x08\x0e-\x1f\x7f]")  # except \t to \r, which are white space
_CONTROL_BYTES = bytes(byte for byte in range(128) if _CONTROL.match(chr(byte)))
_C1_CONTROL = re.compile("[\x80-\x9f]")  # what ISO pages make of bytes that have characters in Windows pages
_BAD = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are wrong
_WIDE = re.compile("[^\0-\x7f\udc80-\udcff]")
_MARKS = (  # the mark of UTF-32-LE begins with that of UTF-16-LE
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_REMEDY = "name its encoding in prepare.encoding, or save it as UTF-8"
_NAMES = {codecs.lookup(page).name.replace("-", "_"): page for page in (*PAGES, *RIVALS)}  # of charset-normalizer
_PART = re.compile(rb"(?s).{1,128}[^\0-\x2f]*.?")  # ends between characters: none has a byte below 0x30 inside
_SAMPLE_PARTS = 128
# These numbers were set on 768 texts of chardet's tests and of message files; docs/texts.md has results.
_MIN_LETTERS = 30  # beyond ASCII; fewer fit several pages
_MIN_COHERENCE = 0.25  # with the frequencies of letters in a language; Russian in an unknown page has less than 0.2
_MIN_COHERENCE_LEAD = 0.05  # over every other page that does not leave more chaos
_MIN_CHAOS_LEAD = 0.02
_MIN_ASIAN_CHAOS_LEAD = 0.05  # for pages with several bytes per character: wrong ones lead by 0.025 in short texts
_MIN_WESTERN_SHARE = 0.97  # of the characters beyond ASCII
_MAX_WESTERN_LETTERS = 0.09  # of all letters; French has 0.06, Hungarian and Slovak have 0.12
# Letters of Western languages, and punctuation where it belongs: other pages have other letters there. "ã" and
# "õ" are Portuguese before "o" and "e", "û" is French before "r" and "t", and else maybe Romanian or Hungarian. A dash
# before "n" or "nes" is the end of "-ción" in mac-roman.
_LETTER = r"[^\W\d_]"
_WESTERN = re.compile(
    "[àáâäåæçèéêëìíîïñòóôöøœùúüßÀÂÄÅÆÇÈÉÊËÎÑÔÖØŒÜ\xa0°§©®™€£•]|[ãÃ](?=[oeOE])|[õÕ](?=[eE])|û(?=[rt])|(?<=[\\d.nN])[ªº]"
    rf"|(?<!{_LETTER})[„“”‘’«»¿¡…–—]|[ÁÍÓÚ](?={_LETTER})|[“”’«»…–—](?!{_LETTER})"
    rf"|(?<={_LETTER})(?:[’…](?={_LETTER})|[–—](?!n(?:es)?\b))"
)


class _Counts(NamedTuple):
    characters: int
    controls: int
    wide: int
    """The characters beyond ASCII."""
    bad: int
    """The bytes that are no character."""


def ignore(count: int) -> None:
    """Do nothing: nobody asked how many characters were read."""


def find_encoding(
    path: Path, name: str, encodings: str | Mapping[str, str] | None, on_read: Callable[[int], object] = ignore
) -> str:
    """Return the encoding that `prepare.encoding` names for a file, after checking it, or the one that is detected.

    `name` is the path relative to the data folder; in a mapping, an exact name counts before the patterns, and of these
    the first that matches. `on_read` is called with the number of characters that were read. Raises `UserError` as
    `detect_encoding` does.
    """
    if isinstance(encodings, Mapping):
        patterns = (pattern for pattern in encodings if fnmatchcase(name, pattern))
        encoding = encodings.get(name) or encodings.get(next(patterns, ""))
    else:
        encoding = encodings
    if encoding is None:
        return detect_encoding(path, on_read)
    if codecs.lookup(encoding).name == "utf-8" and _read_mark(path) == "utf-8-sig":
        encoding = "utf-8-sig"
    counts = _count(path, encoding, on_read)
    _check(path, encoding, counts, "is not {encoding}, which prepare.encoding names; correct either")
    return encoding


def detect_encoding(path: Path, on_read: Callable[[int], object] = ignore) -> str:
    """Return the name of the encoding that reads the whole file.

    That of the byte-order mark if there is one (`utf-8-sig`, `utf-16`, `utf-32`); `iso-2022-jp` if it has its escapes;
    `utf-8` if at least as many of its characters beyond ASCII are right as bytes are wrong; else the code page that
    charset-normalizer finds. Raises `UserError` if the text contains NUL or more than `MAX_CONTROL_SHARE` control
    characters, which means that the file is binary, if the encoding cannot read a byte, naming its line, or if the code
    page is not certain.
    """
    encoding = _read_mark(path) or ("iso-2022-jp" if _is_iso_2022_jp(path) else "utf-8")
    counts = _count(path, encoding, on_read)
    if encoding == "utf-8" and counts.bad > counts.wide:
        encoding = _detect_page(path)
        counts = _count(path, encoding, ignore)
    if encoding.startswith("utf"):
        _check(path, encoding, counts, "is not UTF-8; correct it, or save the file as UTF-8")
    else:
        _check(path, encoding, counts, "is not {encoding}, as which the rest can be read; correct it, or " + _REMEDY)
    return encoding


def _is_iso_2022_jp(path: Path) -> bool:
    """Check whether a file switches to Japanese by an escape sequence, as e-mails do (RFC 1468)."""
    with path.open("rb") as file:
        end = b""
        while block := file.read(_CHUNK_CHARACTERS):
            block = end + block
            if b"\x1b" in block and any(escape in block for escape in (b"\x1b$B", b"\x1b$@")):
                return True
            end = block[-2:]
    return False


def _read_mark(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(4)
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)


def _count(path: Path, encoding: str, on_read: Callable[[int], object]) -> _Counts:
    """Count the characters of a file. Raises `UserError` if it is binary."""
    counts = _Counts(0, 0, 0, 0)
    errors = "strict" if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")) else "surrogateescape"
    lines = 1
    with path.open(encoding=encoding, errors=errors, newline="") as text:
        try:
            while chunk := text.read(_CHUNK_CHARACTERS):
                if "\0" in chunk:
                    lines += chunk.count("\n", 0, chunk.index("\0"))
                    raise _refuse_binary(path, f"a NUL character on line {lines}")
                lines += chunk.count("\n")
                counts = _Counts(*map(sum, zip(counts, _count_chunk(chunk), strict=True)))
                on_read(len(chunk))
        except UnicodeError as error:
            raise UserError(
                f"{path}: bytes that are not {encoding}; name another encoding in prepare.encoding (utf-16-le or "
                "utf-16-be without a byte-order mark), or save it as UTF-8"
            ) from error
    if counts.controls > MAX_CONTROL_SHARE * counts.characters:
        raise _refuse_binary(path, "control characters")
    return counts


def _count_chunk(chunk: str) -> _Counts:
    try:
        data = chunk.encode()
    except UnicodeEncodeError:
        controls, wide, bad = (len(kind.findall(chunk)) for kind in (_CONTROL, _WIDE, _BAD))
        return _Counts(len(chunk), controls, wide, bad)
    # Counted by what is left without them, which is much faster than a search.
    controls = len(data) - len(data.translate(None, _CONTROL_BYTES))
    # A character of several bytes has as many bytes beyond ASCII, and adds one less to the length.
    wide_bytes = int(np.count_nonzero(np.frombuffer(data, np.int8) < 0))
    return _Counts(len(chunk), controls, wide_bytes - (len(data) - len(chunk)), 0)


def _refuse_binary(path: Path, finding: str) -> UserError:
    return UserError(f"{path}: not a text file (binary data: {finding}); remove it, {_REMEDY}")


def _check(path: Path, encoding: str, counts: _Counts, fault: str) -> None:
    if counts.bad:
        raise UserError(f"{_name_bad_byte(path, encoding)}, {fault.format(encoding=encoding)}")


def _name_bad_byte(path: Path, encoding: str) -> str:
    """Return the place and value of the first byte that the encoding (not UTF-16 or UTF-32) cannot read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                return f"{path}:{number}: byte {error.start + 1} of the line, {line[error.start]:#04x}"
    raise ValueError(f"{path}: all bytes are {encoding}")


def _detect_page(path: Path) -> str:
    """Return the code page of a file. Raises `UserError` if it is not certain."""
    matches = charset_normalizer.from_bytes(
        _sample(path), cp_isolation=list(_NAMES), preemptive_behaviour=False, enable_fallback=False
    )
    order = [*_NAMES.values()]
    pages = [min((_NAMES[name] for name in match.could_be_from_charset), key=order.index) for match in matches]
    western = "windows-1252"
    if western in pages and _reads_as_western(str(matches[pages.index(western)])):
        return western
    if pages and pages[0] in PAGES and _is_certain(*matches):
        return pages[0]
    raise UserError(
        f"{_name_bad_byte(path, 'utf-8')}, is not UTF-8, and no other encoding is certain "
        f"({' or '.join(pages[:3]) or 'unknown'}); {_REMEDY}"
    )


def _sample(path: Path) -> bytes:
    """Return parts of lines with bytes beyond ASCII from the whole file: all, or every 2nd, 4th, 8th and so on."""
    parts: list[bytes] = []
    seen, stride = 0, 1
    with path.open("rb") as file:
        for part in chain.from_iterable(_PART.findall(line) for line in file if not line.isascii()):
            if part.isascii():
                continue
            seen += 1
            if seen % stride == 0:
                parts.append(part)
            if len(parts) == 2 * _SAMPLE_PARTS:
                parts = parts[1::2]
                stride *= 2
    return b"".join(parts)


def _reads_as_western(text: str) -> bool:
    """Check whether a text in windows-1252 is in English, or in another Western language with few letters beyond it."""
    wide = _WIDE.findall(text)
    letters = sum(map(str.isalpha, wide))
    if len(_WESTERN.findall(text)) < _MIN_WESTERN_SHARE * len(wide):
        return False
    return letters <= 2 + _MAX_WESTERN_LETTERS * sum(map(str.isalpha, text))


def _is_certain(best: CharsetMatch, *others: CharsetMatch) -> bool:
    """Check whether a text is plausible in its best page, and every other page is clearly worse."""
    text = str(best)
    if _C1_CONTROL.search(text) or sum(map(str.isalpha, _WIDE.findall(text))) < _MIN_LETTERS:
        return False
    is_asian = best.multi_byte_usage > 0
    if best.coherence < _MIN_COHERENCE and not is_asian:  # Asian text often has 0 in its own page
        return False
    chaos_lead = _MIN_ASIAN_CHAOS_LEAD if is_asian else _MIN_CHAOS_LEAD
    return all(
        other.chaos - best.chaos >= chaos_lead or best.coherence - other.coherence >= _MIN_COHERENCE_LEAD
        for other in others
    )
