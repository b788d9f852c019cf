"""The words of a text, in any script that writes words, and the words that count as known.

A word is a run of letters with their combining marks, and apostrophes between them; a run with a digit is no word. In
scripts that are written without spaces, such as Chinese or Thai, each letter counts as a word.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from pipeline.files import whole_file

LEXICON_FILE = "lexicon.txt"

Lexicon = frozenset[str]
"""Folded words, as `fold` returns them; `|` unites two."""
EMPTY_LEXICON: Lexicon = frozenset()

SENTENCE_ENDS = ".!?…。！？।॥؟۔։።"
OPENING_MARKS = '"“„”«»‹›「『'
"""The marks that open a quotation in some language; most close one in another."""
ABBREVIATIONS = frozenset((
    "bzw", "ca", "capt", "co", "col", "dr", "etc", "evtl", "fr", "ggf", "hr", "jr", "lt", "mr", "mrs", "ms", "nr",
    "prof", "rev", "sen", "sr", "st", "usw", "vgl", "vs",
))  # fmt: skip
"""Words after which a full stop does not end a sentence. One that is missing matters little: people's text and a
model's are counted alike."""


def _class_of(*categories: str) -> str:
    """Return the characters of general categories, for a character class; beyond plane 1 only variation selectors."""
    codes = (*range(0x20000), *range(0xE0100, 0xE01F0))
    return "".join(re.escape(chr(code)) for code in codes if unicodedata.category(chr(code)) in categories)


_INNER = r"\u200c\u200d\u00ad" + _class_of("Mn", "Mc", "Me")
_LETTERS = rf"[^\W_]+(?:[{_INNER}]+[^\W_]*)*"
_RUN = re.compile(rf"{_LETTERS}(?:['’ʼ]{_LETTERS})*")
_NUMBER = re.compile(f"[{_class_of('Nd', 'Nl', 'No')}]")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_APOSTROPHE = re.compile("['’ʼ]")
_HEADING = re.compile(r"^ {0,3}#{1,6}\s.*$", re.MULTILINE)
_OPENS = re.compile(rf"(?:[{OPENING_MARKS}]|«\s)[*_]*$")


@dataclass(frozen=True)
class Word:
    """A word of a text, as it is written there."""

    text: str
    start: int
    end: int
    starts_sentence: bool
    """Whether its capital says nothing: it is the first of a sentence, a line or a quotation, or in a heading."""

    @property
    def is_capitalized(self) -> bool:
        """Return whether its longest part between apostrophes begins with a capital: "Oswin's" and "d'Artagnan" do."""
        first = _longest_part(self.text)[0]
        return first.isupper() or first.istitle()

    @property
    def is_small(self) -> bool:
        """Return whether its longest part begins with a letter that has a capital; scripts without case have none."""
        first = _longest_part(self.text)[0]
        return first.islower() and first.title() != first


def words_of(text: str) -> list[Word]:
    """Return the words of a text in order."""
    headings = [match.span() for match in _HEADING.finditer(text)]
    words: list[Word] = []
    for start, end in _spans(text):
        while headings and headings[0][1] <= start:
            headings.pop(0)
        in_heading = bool(headings) and headings[0][0] <= start
        gap = text[words[-1].end : start] if words else None
        first = gap is None or _starts_sentence(gap, words[-1].text)
        words.append(Word(text[start:end], start, end, in_heading or first))
    return words


def _spans(text: str) -> Iterator[tuple[int, int]]:
    for run in _RUN.finditer(text):
        for start, end in _split(run.group()):
            yield run.start() + start, run.start() + end


@lru_cache(maxsize=100_000)
def _split(run: str) -> tuple[tuple[int, int], ...]:
    """Return where the words of a run of letters begin and end. Most runs come again and again."""
    if _NUMBER.search(run) or not any(map(str.isalpha, run)):
        return ()
    # In scripts without spaces, each letter takes the marks up to the next; other letters between them are a word.
    letters = [match.start() for match in _UNSPACED.finditer(run) if match.group().isalpha()]
    if not letters:
        return ((0, len(run)),)
    words = [(0, letters[0])] if letters[0] > 0 else []
    for letter, following in pairwise([*letters, len(run)]):
        own_end = letter + 1
        while own_end < following and unicodedata.category(run[own_end]).startswith("M"):
            own_end += 1
        words.append((letter, own_end))
        if any(map(str.isalpha, run[own_end:following])):
            words.append((own_end, following))
    return tuple(words)


def _starts_sentence(gap: str, before: str) -> bool:
    """Return whether the word after `gap` is at a place where any word may have a capital, after the word `before`."""
    if "\n" in gap or _OPENS.search(gap) or any(mark in gap for mark in "¿¡:"):
        return True
    return any(mark in gap for mark in SENTENCE_ENDS) and not is_abbreviated(before, gap)


def is_abbreviated(word: str, gap: str) -> bool:
    """Return whether the full stop at the beginning of `gap`, after `word`, belongs to an abbreviation or initial."""
    return gap.startswith(".") and (len(word) == 1 or word.casefold() in ABBREVIATIONS)


def fold(word: str) -> str:
    """Return a word without case, with one kind of apostrophe and composed letters."""
    return unicodedata.normalize("NFC", _APOSTROPHE.sub("'", word.replace("\u00ad", "")).casefold())


def core(word: str) -> str:
    """Return the longest part of a word between apostrophes, folded: "oswin" of "Oswin's", "homme" of "l'homme"."""
    return fold(_longest_part(word))


def _longest_part(word: str) -> str:
    return max(_APOSTROPHE.split(word), key=len)


def is_known(word: str, lexicon: Lexicon) -> bool:
    """Return whether a word is in the lexicon, or all its parts between apostrophes are, or it is a capital initial.

    Parts of one or two letters count as known: 's, 'll and l' are added to any word.
    """
    folded = fold(word)
    if folded in lexicon or (len(word) == 1 and word.isupper()):
        return True
    parts = folded.split("'")
    return len(parts) > 1 and all(len(part) <= 2 or part in lexicon for part in parts)


def collect_words(texts: Iterable[str], minimum_count: int = 1) -> Lexicon:
    """Return the folded words that occur at least `minimum_count` times in all texts together.

    A word with an apostrophe counts for its longest part, too: "Oswin's" makes "Oswin" known.
    """
    written: Counter[str] = Counter()
    for text in texts:
        written.update(_RUN.findall(text))
    counts: Counter[str] = Counter()
    for run, count in written.items():
        for start, end in _split(run):
            for word in {fold(run[start:end]), core(run[start:end])}:
                counts[word] += count
    return frozenset(word for word, count in counts.items() if count >= minimum_count)


def load_lexicon(folder: Path) -> Lexicon:
    """Return the words in the lexicon of a base's or an engine's folder; the empty lexicon if it has none."""
    path = folder / LEXICON_FILE
    return frozenset(path.read_text(encoding="utf-8").split("\n")) - {""} if path.is_file() else EMPTY_LEXICON


def write_lexicon(folder: Path, words: Lexicon) -> None:
    """Write words to a folder, one per line and sorted by code points: the same words give the same bytes."""
    with whole_file(folder / LEXICON_FILE) as partial:
        partial.write_bytes("".join(f"{word}\n" for word in sorted(words)).encode())
