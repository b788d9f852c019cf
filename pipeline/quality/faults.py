"""Faults that a reader sees: invented and joined words, names that come once, broken quotations and sentences.

They are counted without a model, by a lexicon of known words. People make them too, or seem to (names, dialect), so a
count means something only beside that of people's texts of the same kind, cut at the same length.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

from pipeline.quality.lexicon import (
    SENTENCE_ENDS,
    Lexicon,
    Word,
    core,
    fold,
    is_abbreviated,
    is_known,
    words_of,
)

JOINED_LETTERS = 3
"""The fewest letters of each of two known words that are found joined: shorter ones are in almost every word."""
CLOSERS: dict[str, str] = {
    '"': '"',
    "“": "”",
    "„": '“”"',
    "”": "”",
    "«": "»",
    "»": "«»",
    "「": "」",
    "『": "』",
}
"""The double quotation marks that open a quotation, each with those that may close it: English “…”, German „…“ and
»…«, Polish „…”, Swedish ”…” and »…», French «…»."""

_MARKS = re.compile(f"[{''.join(dict.fromkeys(''.join(CLOSERS) + ''.join(CLOSERS.values())))}]")
_CLOSING = r"""["“”„«»‹›'’‘)\]」』*_]*"""
_OPENING = r"""["“”„«»‹›'’‘(\[「『*_]*"""
_SENTENCE_END = re.compile(rf"[{SENTENCE_ENDS}]{_CLOSING}$")
_BROKEN_OFF = re.compile(rf"(?:[—–―-]){_CLOSING[:-1]}+$")
"""A dash before a closing mark: somebody is interrupted."""
_LEADS_ON = re.compile(rf"[:;—–―]{_CLOSING}$|--$")
"""What ends a paragraph that leads to a quotation or a list."""
_SENTENCE_BREAK = re.compile(rf"(?P<end>[.!?]+)(?P<closing>{_CLOSING})\s+{_OPENING}")
_HEADING = re.compile(r" {0,3}#{1,6}\s")
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s")
_ATTRIBUTION = re.compile(r"\s*(?:--|[—–―~])")
"""The beginning of a line that names the author of what is above."""


@dataclass(frozen=True, kw_only=True)
class TextFaults:
    """The counts of one text, a continuation of a prompt. One word can have several faults."""

    words: int
    invented_words: int
    """The words that the lexicon does not know. A word that begins with a capital, or has no case, does not count if
    the prompt has it too or it occurs at least twice: it may be a name that the text introduces and keeps."""
    lone_names: int
    """The unknown words with a capital within a sentence that occur once in prompt and text."""
    joined_words: int
    """The unknown words that are two known words without a space, or have a capital after a small letter; not names
    that the text keeps."""
    doubled_words: int
    """The words that repeat the one before, with only space between."""
    paragraphs: int
    """The paragraphs with a word, except headings; a last one that was cut is among them."""
    broken_quotes: int
    """The paragraphs in which quotation marks do not pair. One that leaves a quotation open counts only if the next
    does not open it again; a cut one only if a mark before the cut is wrong."""
    broken_sentences: int
    """The whole paragraphs that do not end with a sentence, plus the sentences that begin with a small letter after
    the end of one."""
    empty: bool
    """Whether the text has no word at all."""

    @property
    def total(self) -> int:
        """All faults; a joined word or a lone name is an invented word already."""
        return self.invented_words + self.doubled_words + self.broken_quotes + self.broken_sentences


@dataclass(frozen=True, kw_only=True)
class FaultRates:
    """The faults of a set of texts: the first four per 1,000 words, the next two per paragraph, the last per text."""

    invented_words: float
    lone_names: float
    joined_words: float
    doubled_words: float
    broken_quotes: float
    broken_sentences: float
    empty_share: float


PER_WORD = ("invented_words", "lone_names", "joined_words", "doubled_words")
PER_PARAGRAPH = ("broken_quotes", "broken_sentences")


def find_faults(text: str, *, prompt: str, lexicon: Lexicon, finished: bool) -> TextFaults:
    """Count the faults of a text that continues a prompt.

    A first word without a space before it continues the prompt's last and is judged with it, as is a first paragraph.
    Unless the text is `finished`, which means that it ended by itself, its last word and its last paragraph may be cut:
    the word is not counted, and the paragraph need not end.
    """
    whole = prompt + text
    words = words_of(whole)
    own = [index for index, word in enumerate(words) if word.end > len(prompt)]
    is_cut = not finished and bool(own) and not whole[words[-1].end :].strip("'’ʼ\N{REPLACEMENT CHARACTER}")
    judged = own[:-1] if is_cut else own
    kept = _kept_names(words, len(prompt))
    occurrences = Counter(core(word.text) for word in words)
    unknown = [words[index] for index in judged if not is_known(words[index].text, lexicon)]
    strange = [word for word in unknown if word.is_small or core(word.text) not in kept]
    paragraphs = list(_paragraphs(whole, len(prompt), finished))
    return TextFaults(
        words=len(judged),
        invented_words=len(strange),
        lone_names=sum(
            word.is_capitalized and not word.starts_sentence and occurrences[core(word.text)] == 1 for word in unknown
        ),
        joined_words=sum(_is_joined(word.text, lexicon) for word in strange),
        doubled_words=sum(_is_doubled(whole, words, index) for index in judged),
        paragraphs=len(paragraphs),
        broken_quotes=sum(paragraph.has_broken_quotes for paragraph in paragraphs),
        broken_sentences=sum(not paragraph.ends for paragraph in paragraphs)
        + sum(_begins_small(whole, words, index) for index in judged),
        empty=not own,
    )


def fault_rates(faults: Sequence[TextFaults]) -> FaultRates:
    """Return the rates of a set of texts from the counts of each; 0 if there is no word, paragraph or text."""
    total = {field.name: sum(getattr(own, field.name) for own in faults) for field in fields(TextFaults)}
    per_word = {name: 1000 * total[name] / max(1, total["words"]) for name in PER_WORD}
    per_paragraph = {name: total[name] / max(1, total["paragraphs"]) for name in PER_PARAGRAPH}
    return FaultRates(**per_word, **per_paragraph, empty_share=total["empty"] / max(1, len(faults)))


def _kept_names(words: Sequence[Word], begin: int) -> set[str]:
    """Return the words with a capital, or without case, that the prompt has or that occur twice."""
    possible = [word for word in words if not word.is_small]
    counts = Counter(core(word.text) for word in possible)
    return {name for name, count in counts.items() if count > 1} | {
        core(word.text) for word in possible if word.end <= begin
    }


def _is_joined(word: str, lexicon: Lexicon) -> bool:
    if any(first.islower() and second.isupper() for first, second in pairwise(word)):
        return True
    letters = core(word)
    return any(
        letters[:cut] in lexicon and letters[cut:] in lexicon
        for cut in range(JOINED_LETTERS, len(letters) - JOINED_LETTERS + 1)
    )


def _is_doubled(whole: str, words: Sequence[Word], index: int) -> bool:
    if index == 0:
        return False
    gap = whole[words[index - 1].end : words[index].start]
    return gap.isspace() and gap.count("\n") < 2 and fold(words[index - 1].text) == fold(words[index].text)


def _begins_small(whole: str, words: Sequence[Word], index: int) -> bool:
    """Return whether a word with a small letter follows a sentence that has ended.

    Not after dots (...), abbreviations, or a question or call that a quotation ends: "Who?" asked the cook.
    """
    if index == 0 or not words[index].text[0].islower() or not words[index].is_small:
        return False
    before = words[index - 1]
    gap = whole[before.end : words[index].start]
    found = _SENTENCE_BREAK.fullmatch(gap)
    if found is None or ".." in found["end"] or is_abbreviated(before.text, gap):
        return False
    return found["end"] == "." or not found["closing"]


class _Paragraph(NamedTuple):
    has_broken_quotes: bool
    ends: bool
    """Whether it ends with a sentence, or need not: it is cut, or an item of a list."""


def _paragraphs(whole: str, begin: int, finished: bool) -> Iterator[_Paragraph]:
    """Yield what is wrong with each paragraph that reaches beyond `begin`."""
    blocks = list(_split_blocks(whole))
    for index, (start, end) in enumerate(blocks):
        block = whole[start:end]
        if end <= begin or _is_heading(block) or not any(map(str.isalpha, block)):
            continue
        following = blocks[index + 1] if index + 1 < len(blocks) else None
        is_cut = not finished and following is None and whole[end:].count("\n") < 2
        opened, is_wrong = _read_quotes(block)
        if opened and not is_cut:
            is_wrong |= following is None or not whole[following[0] : following[1]].lstrip("*_").startswith(opened)
        yield _Paragraph(is_wrong, is_cut or _ends(block, is_last=following is None))


def _split_blocks(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each paragraph begins and ends, without the space around it: an empty line or a heading ends one."""
    spans: list[tuple[int, int]] = []
    for line in re.finditer(r"[^\n]+", text):
        content = line.group().strip()
        if not content:
            continue
        start = line.start() + line.group().index(content)
        span = start, start + len(content)
        if spans and (
            _HEADING.match(line.group())
            or _HEADING.match(text[spans[0][0] : spans[-1][1]])
            or text.count("\n", spans[-1][1], start) > 1
        ):
            yield spans[0][0], spans[-1][1]
            spans = []
        spans.append(span)
    if spans:
        yield spans[0][0], spans[-1][1]


def _is_heading(block: str) -> bool:
    """Return whether a paragraph begins with # or is in capitals without a sentence's end."""
    return _HEADING.match(block) is not None or (block.isupper() and not _SENTENCE_END.search(block))


def _ends(block: str, *, is_last: bool) -> bool:
    lines = block.split("\n")
    for index in range(1, len(lines)):
        if _ATTRIBUTION.match(lines[index]) and not any(map(_SENTENCE_END.search, lines[index:])):
            lines = lines[:index]
            break
    text = "\n".join(lines).rstrip()
    if _SENTENCE_END.search(text) or _BROKEN_OFF.search(text) or _LIST_ITEM.match(lines[-1]):
        return True
    return not is_last and _LEADS_ON.search(text) is not None


def _read_quotes(block: str) -> tuple[str, bool]:
    """Return the mark of the quotation that the paragraph leaves open ("" if none), and whether a mark is wrong.

    A straight mark also is wrong on the wrong side of a space, or between two letters.
    """
    opened: list[str] = []
    for match in _MARKS.finditer(block):
        mark, before, after = match.group(), block[: match.start()][-1:], block[match.end() :][:1]
        if opened and mark in CLOSERS[opened[-1]]:
            if mark == '"' and (before.isspace() or after.isalpha()):
                return "", True
            opened.pop()
        elif mark in CLOSERS and (not opened or mark not in opened):
            if mark == '"' and not opened and before.isdigit():
                continue  # inches
            if mark == '"' and (not after or after.isspace() or before.isalpha()):
                return "", True
            opened.append(mark)
        else:
            return "", True
    return (opened[0] if len(opened) == 1 else ""), len(opened) > 1
