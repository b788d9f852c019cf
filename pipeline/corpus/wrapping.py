"""Join lines that are wrapped at a fixed column; verse, lists, headings and code keep their lines."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise

from pipeline.corpus.fences import split_fences
from pipeline.corpus.pieces import ends_sentence
from pipeline.corpus.words import has_unspaced, word_starts

WRAP_COLUMNS = range(50, 121)
"""The columns at which prose may be wrapped. Verse (a pentameter has about 42 columns) and tables are narrower."""
MIN_BREAKS = 10
"""The fewest line breaks that are evidence of a wrap."""
MIN_FILE_SHARE = 0.6
"""The share of a file's line breaks that a wrap has to explain: verse and plays have under 0.55, prose over 0.65."""
MIN_PARAGRAPH_SHARE = 0.5
"""The share of a paragraph's line breaks of which the wrap has to explain more."""

# Heading, list item, quotation, table row, and a nick of a chat log, perhaps after the time.
_OWN_LINE = re.compile(
    r"\s*(?:#{1,6}\s|[-*+•]\s|\d{1,3}[.)]\s|>|\||(?:[\[(]?\d{1,2}:\d\d(?::\d\d)?[\])]?\s+)?<[^<>\s]{1,40}>\s)"
)
_HEADING = re.compile(r"#{1,6}\s")
_PARAGRAPH_BREAK = re.compile(r"(\n{2,}|\A\n|\n\Z)")
_QUOTES = "\"'“”‘’"
_OPEN_END = re.compile(r"[^\s\-–—][\-–—]+$")


def find_breaks(text: str) -> Iterator[tuple[int, int]]:
    """Yield for each line break inside a paragraph the columns of the line and of the next line's first word.

    A wide character has two columns. A word without a space before it counts one column less: it needs no column for
    the space. What is longer than any wrap counts as that long, so that a file has few different breaks.
    """
    for before, line in pairwise(text.split("\n")):
        if columns := _measure_break(before, line):
            yield min(columns[0], WRAP_COLUMNS.stop), min(columns[1], WRAP_COLUMNS.stop)


def find_wrap(breaks: Counter[tuple[int, int]]) -> int | None:
    """Return the column at which a file's lines are wrapped, or None.

    A wrap at W explains the break after a line of L columns when L <= W and the next word, of w columns, would not have
    fit: L + 1 + w > W. The W that explains most breaks is the file's, if it explains at least `MIN_FILE_SHARE`.
    """
    total = breaks.total()
    explained: Counter[int] = Counter()
    for (columns, word_columns), count in breaks.items():
        for wrap in range(max(columns, WRAP_COLUMNS.start), min(columns + word_columns + 1, WRAP_COLUMNS.stop)):
            explained[wrap] += count
    if total < MIN_BREAKS or not explained:
        return None
    wrap = max(WRAP_COLUMNS, key=lambda column: explained[column])
    return wrap if explained[wrap] >= MIN_FILE_SHARE * total else None


def join_wrapped(text: str, wrap_columns: int) -> tuple[str, int]:
    """Join the lines of paragraphs if the wrap explains most of their breaks; return the text and the joined breaks."""
    result = "".join(
        part if is_block or part.startswith("\n") else _join_paragraph(part, wrap_columns)
        for block, is_block in split_fences(text)
        for part in ([block] if is_block else _PARAGRAPH_BREAK.split(block))
    )
    return result, text.count("\n") - result.count("\n")


def find_joint(line: str, continuation: str) -> str:
    """Return what joins a line to its continuation: a space.

    Nothing joins it after a hyphen that touches its word, and between characters of scripts without spaces.
    """
    return "" if _OPEN_END.search(line[-4:]) or not _is_spaced(line, continuation) else " "


def _join_paragraph(paragraph: str, wrap_columns: int) -> str:
    lines = paragraph.split("\n")
    breaks = [_measure_break(before, line) for before, line in pairwise(lines)]
    # The line fits, but not with the next line's first word.
    explained = [columns is not None and columns[0] <= wrap_columns < sum(columns) + 1 for columns in breaks]
    if sum(explained) <= MIN_PARAGRAPH_SHARE * sum(columns is not None for columns in breaks):
        return paragraph
    joined = lines[0]
    for (before, line), columns, is_explained in zip(pairwise(lines), breaks, explained, strict=True):
        # A sentence that ends in the middle of a line ends a paragraph.
        if is_explained or (columns is not None and not ends_sentence(before)):
            joined += find_joint(before, line) + line.lstrip()
        else:
            joined += "\n" + line
    return joined


def _measure_break(before: str, line: str) -> tuple[int, int] | None:
    """Return the columns of a line and of the next line's first word; None if the next line does not continue it.

    It does not if one of them is blank or a heading, and if it is a list item or indented more.
    """
    before, line = before.rstrip(), line.rstrip()
    if not before or not line or _HEADING.match(before) or _OWN_LINE.match(line):
        return None
    if line[0].isspace() and len(line) - len(line.lstrip()) > len(before) - len(before.lstrip()):
        return None
    is_spaced = before.isascii() or line.isascii() or _is_spaced(before, line)
    return _count_columns(before), _first_word_columns(line) - (not is_spaced)


def _is_spaced(before: str, after: str) -> bool:
    """Return whether the scripts of two lines write a space between them, quotation marks aside."""
    last, first = before.rstrip().rstrip(_QUOTES)[-1:], after.lstrip().lstrip(_QUOTES)[:1]
    return not (has_unspaced(last) and has_unspaced(first))


def _count_columns(text: str) -> int:
    if not has_unspaced(text):
        return len(text)
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def _first_word_columns(line: str) -> int:
    """Return the columns of the first word and of the marks behind it, which no line may begin with."""
    token = line.split(maxsplit=1)[0]
    if not has_unspaced(token):
        return len(token)
    return _count_columns(token[: next(islice(word_starts(token), 1, None), len(token))])
