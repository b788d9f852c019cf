"""Turn a section into candidates for documents. A pure function, so that sections can be cleaned in parallel."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.corpus.cleaning import Repair, clean
from pipeline.corpus.deduplication import Hashes, minhash, shingle
from pipeline.corpus.pieces import cut_pieces
from pipeline.corpus.readers import Section
from pipeline.corpus.words import count_words, digest, normalize_words
from pipeline.params.prepare import PrepareParams

_TITLE = re.compile(r"# +(.+)")
_HEADING_LINE = re.compile(r"^#{1,6} .*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that becomes a document, unless it has a fault or repeats another one."""

    fault: Literal["empty", "fragment"] | None
    title: str
    text: str
    digest: bytes
    """The SHA-256 of the normalized words."""
    shingles: Hashes
    signature: Hashes
    """The MinHash of the shingles."""


@dataclass(frozen=True, slots=True)
class CleanedSection:
    """The candidates of one section, and the counts of what cleaning repaired in it."""

    candidates: list[Candidate]
    page_marks: int
    notices: int
    joined_breaks: int
    removed: Counter[Repair]
    """The number of characters that each repair removed."""


def clean_section(section: Section, wrap_columns: int | None, params: PrepareParams) -> CleanedSection:
    """Clean a section of a file that wraps lines at `wrap_columns`, and cut it if it is running text."""
    options = {"straighten_quotes": params.straighten_quotes, "strip_markup": params.strip_markup}
    cleaned = clean(section.text, wrap_columns=wrap_columns, **options)
    title = clean(section.title, wrap_columns=None, **options).text
    texts = cut_pieces(cleaned.text, params.piece_words) if section.running else [cleaned.text]
    min_words = 0 if section.running or section.whole else params.minimum_words
    cleaned.removed["space"] += len(cleaned.text) - sum(map(len, texts))
    candidates = [_make_candidate(text, title, min_words, params) for text in texts]
    return CleanedSection(candidates, cleaned.page_marks, cleaned.notices, cleaned.joined_breaks, cleaned.removed)


def _make_candidate(text: str, title: str, min_words: int, params: PrepareParams) -> Candidate:
    words = normalize_words(text)
    if not words:
        return _reject("empty", text)
    if count_words(_HEADING_LINE.sub("", text)) < min_words:
        return _reject("fragment", text)
    heading = _TITLE.match(text)
    shingles = shingle(words, params.near_duplicate.ngram_words)
    return Candidate(
        fault=None,
        title=" ".join(title.split()) or (heading[1] if heading else ""),
        text=text,
        digest=digest(words),
        shingles=shingles,
        signature=minhash(shingles, params.near_duplicate.permutations),
    )


def _reject(fault: Literal["empty", "fragment"], text: str) -> Candidate:
    nothing = np.empty(0, dtype=np.uint64)
    return Candidate(fault, "", text, b"", nothing, nothing)
