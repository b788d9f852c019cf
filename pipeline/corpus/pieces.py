"""Cut running text into pieces, at places that depend on its content."""

import re
import unicodedata
from collections.abc import Iterator
from itertools import accumulate

from pipeline.corpus.words import count_words, digest, has_unspaced, join_words, word_starts

MAX_PARAGRAPH_PIECES = 2
"""The longest paragraph that stays whole, as a multiple of the words of a piece."""

_ENDS = ".!?…。！？｡।॥؟۔።།။៕។"
_CLOSERS = "\"'”’)\\]»›」』）】》〉"
_SENTENCE_END = re.compile(rf"[{_ENDS}][{_CLOSERS}*_]*$")
_HEADING = re.compile(r"#{1,6}\s")
# Where text may be cut, best first: blank lines, line ends, sentence ends (no space follows 。), spaces.
_CUTS = (
    re.compile(r"\n{2,}"),
    re.compile(r"\n"),
    re.compile(
        rf"(?:(?<=[{_ENDS}])|(?<=[{_ENDS}][{_CLOSERS}]))[ \t]+"
        rf"|(?:(?<=[。！？｡])|(?<=[。！？｡][”’」』）】》〉]))(?![\s。！？｡…{_CLOSERS}])"
    ),
    re.compile(r"[ \t]+"),
)


def ends_sentence(line: str) -> bool:
    """Check whether the line's last word ends a sentence, apart from closing quotes and brackets."""
    return _SENTENCE_END.search(line.rstrip()) is not None


def cut_pieces(text: str, piece_words: int) -> list[str]:
    """Cut a text between paragraphs into pieces of half to one and a half times `piece_words` words.

    A paragraph of more than `MAX_PARAGRAPH_PIECES` times `piece_words` is cut at line ends, else sentence ends, else
    spaces, else between words that have none; a heading stays with what follows. Of the cuts that the size allows, the
    one before the paragraph with the smallest hash is taken (content-defined chunking, Muthitacharoen et al. 2001), so
    that a change moves only the cuts near it: the other pieces keep their ids and splits, and two editions of a book
    are cut at the same places, so that their duplicates can be found. Only the white space at the cuts is lost.
    """
    units = list(_split_units(text, MAX_PARAGRAPH_PIECES * piece_words))
    words_before = [0, *accumulate(count_words(unit) for _, unit in units)]
    pieces = []
    start = 0
    while start < len(units):
        end = _find_cut(units, words_before, start, piece_words)
        separators_and_units = [part for pair in units[start:end] for part in pair]
        pieces.append("".join(separators_and_units[1:]))
        start = end
    return pieces


def _find_cut(units: list[tuple[str, str]], words_before: list[int], start: int, piece_words: int) -> int:
    """Return the index of the unit at which the piece that begins at `start` ends."""
    total = words_before[-1]
    allowed: list[int] = []
    for index in range(start + 1, len(units)):
        words, words_left = words_before[index] - words_before[start], total - words_before[index]
        if 2 * words_left < piece_words or (allowed and 2 * words > 3 * piece_words):
            break
        if 2 * words >= piece_words and not _HEADING.match(units[index - 1][1]):
            allowed.append(index)
    return min(allowed, key=lambda index: digest(join_words(units[index][1])), default=len(units))


def _split_units(text: str, max_words: int, level: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the units between possible cuts, each with the white space before it."""
    start = 0
    separator = ""
    cuts = list(_find_cuts(text, level))
    for cut_start, cut_end in [*cuts, (len(text), len(text))]:
        unit = text[start:cut_start]
        if level < len(_CUTS) and count_words(unit) > max_words:
            (_, first), *others = _split_units(unit, max_words, level + 1)
            yield separator, first
            yield from others
        else:
            yield separator, unit
        separator, start = text[cut_start:cut_end], cut_end


def _find_cuts(text: str, level: int) -> Iterator[tuple[int, int]]:
    if level < len(_CUTS):
        yield from (match.span() for match in _CUTS[level].finditer(text))
    elif has_unspaced(text):
        for start in word_starts(text):
            before = text[start - 1 : start]
            if before and before not in "\"'" and unicodedata.category(before) not in ("Ps", "Pi", "Zs"):
                yield start, start
