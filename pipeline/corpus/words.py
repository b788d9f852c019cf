"""The words of a text in any script: their number, the first of them, and their digest for comparisons.

Between white space is one word, except in scripts that write none between words. There, as by the default of Unicode's
text segmentation (UAX #29), each ideograph, each hiragana and each run of katakana is a word. UAX #29 leaves Thai, Lao,
Khmer and Myanmar to a dictionary; without one, a word is what no line break may split, about a syllable: a letter with
its marks, the vowel written before it, and what is stacked below it or closes it. A Tibetan word ends at a tsheg.
"""

import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import TypeVar

import numpy as np
import regex
from numpy.typing import NDArray

Code = TypeVar("Code", np.uint8, np.uint32)

_JOINERS = "\u200c\u200d"
_ALONE = r"[\p{Han}\p{Hiragana}]"
_KATAKANA = r"[\p{Katakana}ーｰﾞﾟ]"
_STACKED = r"[\p{Line_Break=Complex_Context}&&\p{L}]"
_SYLLABLE = (
    rf"[เ-ไເ-ໄ]?{_STACKED}(?:[\p{{M}}{_JOINERS}]"
    rf"|(?<=[\u1039\u17d2\u1a60]){_STACKED}"  # below another letter
    rf"|{_STACKED}(?=\u1037?\u103a)"  # closes a Burmese syllable
    r"|[ะาำๅๆະາຳຽໆ])*"
)
_IDEOGRAPH = rf"[{_ALONE}&&[\p{{L}}\p{{N}}]][\p{{M}}ー]*"
_UNSPACED = rf"[{_ALONE}{_KATAKANA}{_STACKED}]"
_RUN = rf"[[\p{{L}}\p{{N}}]--{_UNSPACED}][[\p{{L}}\p{{N}}\p{{M}}{_JOINERS}]--{_UNSPACED}]*"
_NATIVE = rf"{_SYLLABLE}|{_IDEOGRAPH}|[{_KATAKANA}&&\p{{L}}][{_KATAKANA}\p{{M}}]*"
_COMPARED = regex.compile(f"{_NATIVE}|{_RUN}", regex.VERSION1)
_COUNTED = regex.compile(rf"{_NATIVE}|{_RUN}(?:['’.,]{_RUN})*", regex.VERSION1)

_TOKEN = re.compile(r"\S+")
_ASCII = bytes(range(128))
_WIDE_SPACE = re.compile(r"\s")
_WORDS_AND_SPACES = bytes(ord(" ") if byte < 128 and chr(byte).isspace() else ord("w") for byte in range(256))
_BETWEEN_WORDS = "‘’“”–—…"  # also in NFC, as no other character combines with them
_LATIN_WORDS = "".join(c.lower() if c.isalnum() else " " for c in map(chr, range(256))).encode("latin-1")
"""The byte that each character of Latin-1 becomes in a normalized word, or a space between words."""
# The blocks of scripts without spaces, of marks and of scripts with marks. Most texts have no such character, and this
# is five times as fast to see as by properties.
_MAY_BE_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1361\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u312f\u31a0-\u31ff\u3400-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff00-\uff9f\U00011700-\U0001174f\U00016fe0-\U0001b2ff"
    "\U00020000-\U0003ffff]"
)
_MAY_HAVE_MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u1fff\u20d0-\u20ff\u2cef-\u2cf1\u2d7f\u2de0-\uabff\uf900-\ufaff\ufb1e"
    "\ufe00-\ufe2f\uff66-\uff9f\U00010000-\U0010ffff]"
)


def count_words(text: str) -> int:
    """Return the number of words: what white space separates, and each word of a script without spaces."""
    wide = "" if text.isascii() else _beyond_ascii(text)
    if _MAY_BE_UNSPACED.search(wide):
        return sum(max(1, len(_find_words(token))) for token in text.split())
    if _WIDE_SPACE.search(wide):
        return len(text.split())
    words = text.encode(errors="surrogatepass").translate(_WORDS_AND_SPACES)
    return words.count(b" w") + words.startswith(b"w")


def leading_words(text: str, count: int) -> str:
    """Return the first `count` words of a text with what is between them, but no white space after the last."""
    end = 0
    left = count
    for token in _TOKEN.finditer(text):
        if left <= 0:
            break
        words = _find_words(token.group())
        end = token.start() + words[left - 1][1] if left <= len(words) else token.end()
        left -= max(1, len(words))
    return text[:end]


def word_starts(text: str) -> Iterator[int]:
    """Yield where the words of a text begin."""
    for token in _TOKEN.finditer(text):
        for start, _ in _find_words(token.group()):
            yield token.start() + start


def has_unspaced(text: str) -> bool:
    """Check whether a text may have words without spaces between them."""
    return not text.isascii() and _MAY_BE_UNSPACED.search(_beyond_ascii(text)) is not None


def join_words(text: str) -> bytes:
    """Return the words for comparisons, in UTF-8 with a space between two.

    They are in lower case and NFC: letters and digits with their marks, without joiners. They do not depend on spacing,
    case, punctuation and the form of accents. At an apostrophe a word ends.
    """
    for mark in _BETWEEN_WORDS:
        text = text.replace(mark, " ")
    try:
        latin = text.encode("latin-1").translate(_LATIN_WORDS)
    except UnicodeEncodeError:
        return _join_wide_words(text)
    words = _squeeze_spaces(np.frombuffer(latin, np.uint8)).tobytes()
    return words if words.isascii() else words.decode("latin-1").encode()


def digest(joined_words: bytes) -> bytes:
    """Return the SHA-256 of what `join_words` returns."""
    return hashlib.sha256(joined_words).digest()


def _join_wide_words(text: str) -> bytes:
    text = unicodedata.normalize("NFC", text.lower())
    for joiner in _JOINERS:
        text = text.replace(joiner, "")
    if _MAY_HAVE_MARKS.search(_beyond_ascii(text)):
        return " ".join(_COMPARED.findall(text)).encode()
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
    words = _squeeze_spaces(np.where(_in_words()[codes], codes, np.uint32(ord(" "))))
    return words.tobytes().decode("utf-32-le").encode()


@cache
def _in_words() -> NDArray[np.bool_]:
    """Return for each code point whether it is a letter or a digit, which belong to a word."""
    characters = "".join(map(chr, range(0xD800))) + " " * 0x800 + "".join(map(chr, range(0xE000, sys.maxunicode + 1)))
    found = np.zeros(len(characters), bool)
    for match in regex.finditer(r"[\p{L}\p{N}]+", characters):
        found[match.start() : match.end()] = True
    return found


def _squeeze_spaces(codes: NDArray[Code]) -> NDArray[Code]:
    """Return characters without spaces at both ends and with one where there are several."""
    is_space = np.concatenate(([True], codes == ord(" "), [True]))
    # A space stays if a word ends before it; that behind the last word goes.
    kept: NDArray[Code] = codes[~(is_space[1:-1] & is_space[:-2])]
    return kept[:-1] if len(kept) and kept[-1] == ord(" ") else kept


def _beyond_ascii(text: str) -> str:
    """Return the characters beyond ASCII, in which a search is faster than in the text."""
    return text.encode(errors="surrogatepass").translate(None, _ASCII).decode(errors="surrogatepass")


def _find_words(token: str) -> list[tuple[int, int]]:
    """Return where the words of a token without white space begin and end; the token is one if it has spaces around."""
    if not has_unspaced(token):
        return [(0, len(token))]
    return [match.span() for match in _COUNTED.finditer(token)]
