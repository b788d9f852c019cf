"""Detect the encoding of a text file; refuse binary files, damaged bytes, and guesses that are not certain."""

import codecs
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import charset_normalizer

from pipeline.corpus.plausibility import CODE_PAGES, measure_fit, reads_as_western
from pipeline.errors import UserError

MAX_CONTROL_SHARE = 0.01
"""The largest share of control characters in a text file: text has next to none, a terminal recording or a compressed
file has more."""
SAMPLE_BYTES = 1 << 11
"""The approximate size of the sample from which a code page is detected: lines from the whole file, without those in
ASCII."""
MIN_FIT = 0.9
"""The smallest share of the characters beyond ASCII that a language of the code page has to explain. Right guesses have
more than 0.95, with foreign names and quotations more than 0.9."""

_CHUNK_CHARACTERS = 1 << 20
_CONTROL = re.compile(r"[\x01-\x08\x0e-\x1f\x7f]")  # except \t to \r, which are white space
_BAD = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are wrong
_WIDE = re.compile("[^\0-\x7f\udc80-\udcff]")
_CUT = re.compile(rb"[\0-\x2f]")
_MARKS = (  # the mark of UTF-32-LE begins with that of UTF-16-LE
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PAGES = {codecs.lookup(page).name.replace("-", "_"): page for page in CODE_PAGES}
"""The code pages by the names that charset-normalizer uses."""
_MAX_SCORE_GAP = 0.03  # these were tuned on about 400 texts of chardet's tests and of message files
_MIN_FAULT_SHARE = 0.25
_MIN_MAC_FAULTS = 5
_CHAOS_WEIGHT = 0.3  # charset-normalizer's measure of disorder, which names and formulas raise in every page
_REMEDY = "name its encoding in prepare.encoding, or save it as UTF-8"


class _Counts(NamedTuple):
    characters: int
    controls: int
    wide: int
    """The characters beyond ASCII."""
    bad: int
    """The bytes that are no character."""


class _Guess(NamedTuple):
    """A code page that can read the sample."""

    page: str
    text: str
    fit: float
    faults: float
    """The number of characters beyond ASCII that no language of the page explains."""
    score: float
    coherence: float
    """The similarity of the letters' frequencies with those of a language, from charset-normalizer."""


def find_encoding(path: Path, name: str, encodings: str | Mapping[str, str] | None) -> str:
    """Return the encoding that `prepare.encoding` names for a file, after checking it, or the one that is detected.

    `name` is the path relative to the data folder; in a mapping, an exact name counts before the patterns, and of these
    the first that matches. Raises `UserError` as `detect_encoding` does.
    """
    if isinstance(encodings, Mapping):
        patterns = (pattern for pattern in encodings if fnmatchcase(name, pattern))
        encoding = encodings.get(name) or encodings.get(next(patterns, ""))
    else:
        encoding = encodings
    if encoding is None:
        return detect_encoding(path)
    if codecs.lookup(encoding).name == "utf-8" and _read_mark(path) == "utf-8-sig":
        encoding = "utf-8-sig"
    _check(path, encoding, _count(path, encoding), "is not {encoding}, which prepare.encoding names; correct either")
    return encoding


def detect_encoding(path: Path) -> str:
    """Return the name of the encoding that reads the whole file.

    That of the byte-order mark if there is one (`utf-8-sig`, `utf-16`, `utf-32`); `utf-8` if at least as many of its
    characters beyond ASCII are right as bytes are wrong; else the code page that charset-normalizer finds and whose
    languages explain the text. Raises `UserError` if the text contains NUL or more than `MAX_CONTROL_SHARE` control
    characters, which means that the file is binary, if the encoding cannot read a byte, naming its line, or if two code
    pages read the text differently and neither is certain.
    """
    encoding = _read_mark(path) or "utf-8"
    counts = _count(path, encoding)
    if encoding == "utf-8" and counts.bad > counts.wide:
        if counts.controls > MAX_CONTROL_SHARE * counts.characters:
            raise _refuse_binary(path, "control characters")
        encoding = _detect_page(path)
        counts = _count(path, encoding)
        _check(path, encoding, counts, "is not {encoding}, as which the rest can be read; correct it, or " + _REMEDY)
    _check(path, encoding, counts, "is not UTF-8; correct it, or save the file as UTF-8")
    return encoding


def _read_mark(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(4)
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)


def _count(path: Path, encoding: str) -> _Counts:
    """Count the characters of a file. Raises `UserError` for NUL, and for bad UTF-16 and UTF-32."""
    counts = _Counts(0, 0, 0, 0)
    errors = "strict" if _is_wide(encoding) else "surrogateescape"
    lines = 1
    with path.open(encoding=encoding, errors=errors, newline="") as text:
        try:
            while chunk := text.read(_CHUNK_CHARACTERS):
                if "\0" in chunk:
                    lines += chunk.count("\n", 0, chunk.index("\0"))
                    raise _refuse_binary(path, f"a NUL character on line {lines}")
                lines += chunk.count("\n")
                found = (len(chunk), *(len(kind.findall(chunk)) for kind in (_CONTROL, _WIDE, _BAD)))
                counts = _Counts(*map(sum, zip(counts, found, strict=True)))
        except UnicodeError as error:
            raise _refuse_binary(path, f"bytes that are not {encoding}") from error
    return counts


def _is_wide(encoding: str) -> bool:
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def _refuse_binary(path: Path, finding: str) -> UserError:
    return UserError(f"{path}: not a text file (binary data: {finding}); remove it, {_REMEDY}")


def _check(path: Path, encoding: str, counts: _Counts, fault: str) -> None:
    if counts.controls > MAX_CONTROL_SHARE * counts.characters:
        raise _refuse_binary(path, "control characters")
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
    guesses = _guess(_sample(path))
    if guesses and guesses[0].fit >= MIN_FIT:
        rivals = [guess for guess in guesses if guess is guesses[0] or _is_rival(guess, guesses[0])]
        page = _choose(rivals)
        if page:
            return page
        likely = " or ".join(rival.page for rival in rivals[:3])
    else:
        likely = "unknown"
    raise UserError(
        f"{_name_bad_byte(path, 'utf-8')}, is not UTF-8, and no other encoding is certain ({likely}); {_REMEDY}"
    )


def _sample(path: Path) -> bytes:
    """Return lines with bytes beyond ASCII from the whole file: all of them, or every 2nd, 4th, 8th and so on."""
    lines: list[bytes] = []
    size = seen = 0
    stride = 1
    with path.open("rb") as file:
        for line in chain.from_iterable(map(_cut_line, file)):
            if line.isascii():
                continue
            seen += 1
            if seen % stride == 0:
                lines.append(line)
                size += len(line)
            if size > 2 * SAMPLE_BYTES and len(lines) > 1:
                lines = lines[1::2]
                size = sum(map(len, lines))
                stride *= 2
    return b"".join(lines)


def _cut_line(line: bytes) -> Iterator[bytes]:
    """Yield a long line in parts, never cut inside a character: no page has a byte below 0x30 inside of one."""
    start = 0
    while len(line) - start > SAMPLE_BYTES and (cut := _CUT.search(line, start + SAMPLE_BYTES // 4)):
        yield line[start : cut.end()]
        start = cut.end()
    yield line[start:]


def _guess(sample: bytes) -> list[_Guess]:
    """Return the code pages that can read a sample, best first; of those that read it alike, only the first."""
    matches = charset_normalizer.from_bytes(
        sample, threshold=0.4, cp_isolation=list(_PAGES), preemptive_behaviour=False, enable_fallback=False
    )
    by_text: dict[str, _Guess] = {}
    for match in matches:
        for name in match.could_be_from_charset:
            text = sample.decode(name)
            fit = measure_fit(text, _PAGES[name])
            faults = (1 - fit) * len(_WIDE.findall(text))
            guess = _Guess(_PAGES[name], text, fit, faults, fit - _CHAOS_WEIGHT * match.chaos, match.coherence)
            if text not in by_text or _rank(guess) < _rank(by_text[text]):
                by_text[text] = guess
    return sorted(by_text.values(), key=_rank)


def _rank(guess: _Guess) -> tuple[float, int]:
    return -round(guess.score, 4), CODE_PAGES.index(guess.page)


def _is_rival(guess: _Guess, best: _Guess) -> bool:
    """Check whether the text does not settle which of two pages it has.

    It does if the other page has many more faults, measured by the number of characters that the two read differently.
    """
    if best.page.startswith("mac-") and guess.fit >= MIN_FIT:  # the pages of old Macs are rare
        return guess.faults - best.faults < _MIN_MAC_FAULTS
    if guess.score < best.score - _MAX_SCORE_GAP:
        return False
    if len(guess.text) == len(best.text):
        differing = sum(first != second for first, second in zip(guess.text, best.text, strict=True))
    else:
        differing = max(len(_WIDE.findall(guess.text)), len(_WIDE.findall(best.text)))
    return guess.faults - best.faults < _MIN_FAULT_SHARE * differing


def _choose(rivals: list[_Guess]) -> str | None:
    """Return the page of the best guess, or None if it is not certain."""
    best = rivals[0]
    if len(rivals) == 1:
        return best.page
    if best.page.startswith("mac-"):  # too rare to be chosen by less than that
        return None
    # Bytes seldom form the frequent characters of an Asian page by chance.
    others = rivals[1:]
    if all(len(best.text) < len(other.text) and other.faults > best.faults for other in others):
        return best.page
    western = next((rival for rival in rivals if rival.page == "windows-1252"), None)
    macs = [rival.coherence for rival in rivals if rival.page.startswith("mac-")]
    if western and reads_as_western(western.text) and western.coherence >= max(macs, default=0.0):
        return western.page
    first, second, *_ = sorted(rivals, key=lambda rival: -rival.coherence)
    letters = sum(map(str.isalpha, best.text))
    return first.page if first.coherence - second.coherence >= 0.05 + 5 / max(1, letters) else None
