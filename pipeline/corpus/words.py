"""The words of a text in any script: their number, the first of them, and their digest for comparisons.

Between white space is one word, except in scripts that write none between words. There, as by the default of Unicode's
text segmentation (UAX #29), each ideograph, each hiragana and each run of katakana is a word. UAX #29 leaves Thai, Lao,
Khmer and Myanmar to a dictionary; without one, a word is what no line break may split, about a syllable: a letter with
its marks, the vowel written before it, and what is stacked below it or closes it. A Tibetan word ends at a tsheg.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

import regex

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

_PLAIN_WORD = re.compile(r"[^\W_]+")
_TOKEN = re.compile(r"\S+")
_ASCII = bytes(range(128))
_WIDE_SPACE = re.compile(r"\s")
_WORDS_AND_SPACES = bytes(ord(" ") if byte < 128 and chr(byte).isspace() else ord("w") for byte in range(256))
_BETWEEN_WORDS = "‘’“”–—…"  # also in NFC, as no other character combines with them
_LATIN_WORDS = "".join(c.lower() if _PLAIN_WORD.match(c) else " " for c in map(chr, range(256))).encode("latin-1")
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
    if has_unspaced(text):
        return sum(max(1, len(_find_words(token))) for token in text.split())
    if _WIDE_SPACE.search(_beyond_ascii(text)):
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


def normalize_words(text: str) -> list[str]:
    """Return the words in lower case and NFC, letters and digits with their marks, without joiners.

    They do not depend on spacing, case, punctuation and the form of accents. At an apostrophe a word ends.
    """
    text = text.lower()
    if text.isascii():
        return _PLAIN_WORD.findall(text)
    text = unicodedata.normalize("NFC", text)
    for joiner in _JOINERS:
        text = text.replace(joiner, "")
    return (_COMPARED if _MAY_HAVE_MARKS.search(text) else _PLAIN_WORD).findall(text)


def word_bytes(text: str) -> list[bytes]:
    """Return `normalize_words` in UTF-8. Texts in Latin-1, curly quotes and dashes aside, take a third of the time."""
    for mark in _BETWEEN_WORDS:
        text = text.replace(mark, " ")
    try:
        latin = text.encode("latin-1")
    except UnicodeEncodeError:
        return [word.encode() for word in normalize_words(text)]
    return latin.translate(_LATIN_WORDS).decode("latin-1").encode().split()


def digest(words: Sequence[str]) -> bytes:
    """Return the SHA-256 of normalized words."""
    return hashlib.sha256(" ".join(words).encode()).digest()


def _beyond_ascii(text: str) -> str:
    """Return the characters beyond ASCII, in which a search is faster than in the text."""
    return text.encode(errors="surrogatepass").translate(None, _ASCII).decode(errors="surrogatepass")


def _find_words(token: str) -> list[tuple[int, int]]:
    """Return where the words of a token without white space begin and end; the token is one if it has spaces around."""
    if not has_unspaced(token):
        return [(0, len(token))]
    return [match.span() for match in _COUNTED.finditer(token)]
