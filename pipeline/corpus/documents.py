"""Turn sections into rows, the candidates for documents. Pure functions, so that chunks are cleaned in parallel."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.cleaning import Repairs, clean
from pipeline.corpus.pieces import cut_pieces
from pipeline.corpus.readers import Section
from pipeline.corpus.similarity import Hashes, band_keys, choose_bands, hash_ngrams, make_set, minhash
from pipeline.corpus.splits import SPLITS, choose_split
from pipeline.corpus.words import count_words, digest, join_words
from pipeline.params.prepare import PrepareParams

Chunk = list[tuple[int, int | None, Section]]
"""Sections, each with the position of its file and the column at which the file wraps lines."""
Fault = Literal["", "empty", "fragment"]
FAULTS: tuple[Fault, ...] = ("", "empty", "fragment")

ROW = np.dtype([
    ("fault", "u1"),  # its index in FAULTS; a row that has one is no document, and only its characters are known
    ("split", "u1"),  # its index in SPLITS
    ("characters", "<u8"),
    ("words", "<u8"),
    ("bytes", "<u8"),  # of the text, in UTF-8
    ("line_bytes", "<u8"),  # of the beginning of the document's line
    ("id", "<u8"),
])  # fmt: skip
"""What is known of a row besides its text; it takes the place of the text wherever rows are counted or compared."""

_TITLE = re.compile(r"# +(.+)")
_HEADING_LINE = re.compile(r"^#{1,6} .*$", re.MULTILINE)


@dataclass(slots=True)
class FilePart:
    """The part of one file in a chunk."""

    position: int
    rows: int = 0
    characters: int = 0
    """The number of characters before cleaning."""
    repairs: Repairs = field(default_factory=Repairs)


@dataclass(frozen=True, slots=True)
class CleanedChunk:
    """The rows of a chunk's sections, in order."""

    parts: list[FilePart]
    rows: NDArray[Any]
    """A `ROW` each."""
    lines: bytes
    """The beginnings of the documents' lines, in JSON, without gaps. Their ends, which `end_line` gives, name the rows,
    and a row's number is not known before all rows before it."""
    keys: Hashes
    """The keys of the rows without a fault, (rows, bands)."""


def clean_chunk(params: PrepareParams, chunk: Chunk) -> CleanedChunk:
    """Clean sections, and cut those that are running text into pieces."""
    parts: list[FilePart] = []
    rows: list[tuple[int, ...]] = []
    lines: list[bytes] = []
    documents: list[bytes] = []
    for position, wrap_columns, section in chunk:
        if not parts or parts[-1].position != position:
            parts.append(FilePart(position))
        texts, title, repairs = _clean_section(section, wrap_columns, params)
        parts[-1].rows += len(texts)
        parts[-1].characters += len(section.text)
        parts[-1].repairs.add(repairs)
        min_words = 0 if section.running or section.whole else params.minimum_words
        for text in texts:
            row, line, words = _make_row(text, title, min_words, params)
            rows.append(row)
            if line:
                lines.append(line)
                documents.append(words)
    near = params.near_duplicate
    signatures = [minhash(shingles, near.permutations) for shingles in hash_ngrams(documents, near.ngram_words)]
    keys = band_keys(
        np.array(signatures, np.uint64).reshape(-1, near.permutations), *choose_bands(near.permutations, near.jaccard)
    )
    return CleanedChunk(parts, np.array(rows, ROW), b"".join(lines), keys)


def end_line(line: bytes, source: str) -> bytes:
    """Return a document's line from its beginning and the name of its row."""
    return line + json.dumps(source, ensure_ascii=False).encode() + b"}\n"


def shingles_of(ngram_words: int, lines: list[bytes]) -> list[Hashes]:
    """Return the shingles of documents from the beginnings of their lines."""
    texts = [json.loads(end_line(line, ""))["text"] for line in lines]
    return [make_set(hashes) for hashes in hash_ngrams([join_words(text) for text in texts], ngram_words)]


def _clean_section(section: Section, wrap_columns: int | None, params: PrepareParams) -> tuple[list[str], str, Repairs]:
    """Return the texts of a section, which are several if it is running text, their title, and the repairs."""
    options = {"straighten_quotes": params.straighten_quotes, "strip_markup": params.strip_markup}
    cleaned, repairs = clean(section.text, wrap_columns=wrap_columns, **options)
    title = clean(section.title, wrap_columns=None, **options)[0] if section.title else ""
    texts = cut_pieces(cleaned, params.piece_words) if section.running else [cleaned]
    repairs.removed["space"] += len(cleaned) - sum(map(len, texts))
    return texts, " ".join(title.split()), repairs


def _make_row(text: str, title: str, min_words: int, params: PrepareParams) -> tuple[tuple[int, ...], bytes, bytes]:
    """Return a row, the beginning of its line, which is empty for a fault, and its words, joined."""
    joined_words = join_words(text)
    words = count_words(text)
    fault: Fault = ""
    if not joined_words:
        fault = "empty"
    elif words < min_words or ("#" in text and count_words(_HEADING_LINE.sub("", text)) < min_words):
        fault = "fragment"
    if fault:
        return (FAULTS.index(fault), 0, len(text), 0, 0, 0, 0), b"", joined_words
    words_digest = digest(joined_words)
    heading = _TITLE.match(text)
    document = {"id": words_digest.hex()[:16], "title": title or (heading[1] if heading else ""), "text": text}
    line = json.dumps(document, ensure_ascii=False).encode()[:-1] + b', "source": '
    split = choose_split(words_digest, validation_share=params.validation_share, test_share=params.test_share)
    number = int.from_bytes(words_digest[:8], "big")
    return (0, SPLITS.index(split), len(text), words, len(text.encode()), len(line), number), line, joined_words
