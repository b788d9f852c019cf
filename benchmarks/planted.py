"""Documents of mixed sentences as JSON lines, with families of duplicates whose number is known."""

import json
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.corpus.readers import TEXT_ENDINGS

DOCUMENT_CHARACTERS = 2150
"""The mean size of a document."""
SENTENCES_PER_PARAGRAPH = 5
EXACT_SHARE = 0.04
"""The share of documents that repeat an earlier one in other spacing, which are exact duplicates."""
NEAR_SHARE = 0.06
"""The share of documents that are an earlier one with its last sentence replaced, which are near-duplicates."""
FAMILY_REACH = 2000
"""How many of the latest originals a duplicate may repeat."""
LONGEST_REPLACED = 0.1
"""The share of a document's words that the replaced sentence may have: the Jaccard similarity stays above 0.7."""
_PLAIN = re.compile(r"(?!.*(?i:produced|prepared|scanned|transcri))[^<>&{}\[\]()_*#|`~^\\]+")
"""A sentence that cleaning leaves as it is, alone and among others, so that what is planted is found."""
_SENTENCE_END = re.compile(r"(?<=[.!?][\"”’]) +|(?<=[.!?]) +")


@dataclass(slots=True)
class Planted:
    """What was written."""

    documents: int = 0
    exact: int = 0
    near: int = 0


def read_sentences(folder: Path) -> list[str]:
    """Return the distinct sentences of 4 to 60 words in the text files of a folder, in order."""
    found: dict[str, None] = {}
    for text in (file for file in sorted(folder.rglob("*")) if file.suffix in TEXT_ENDINGS):
        for paragraph in text.read_text(encoding="utf-8-sig", errors="replace").split("\n\n"):
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                if 4 <= len(sentence.split()) <= 60 and _PLAIN.fullmatch(sentence):
                    found[sentence] = None
    return list(found)


def write_documents(file: Path, sentences: Sequence[str], megabytes: float, seed: int = 1) -> Planted:
    """Write about this many MB (10**6 bytes) of rows with `text` and return how many of each kind they are."""
    planted = Planted()
    with file.open("w", encoding="utf-8") as lines:
        written = 0
        for text in _documents(sentences, random.Random(seed), planted):
            written += lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if written >= megabytes * 1e6:
                return planted
    return planted


def _documents(sentences: Sequence[str], draw: random.Random, planted: Planted) -> Iterator[str]:
    originals: deque[list[str]] = deque(maxlen=FAMILY_REACH)
    while True:
        planted.documents += 1
        kind = draw.random()
        if originals and kind < EXACT_SHARE:
            planted.exact += 1
            yield _lay_out(draw.choice(originals)).replace(" ", "  ")
        elif originals and kind < EXACT_SHARE + NEAR_SHARE:
            original = draw.choice(originals)
            planted.near += 1
            yield _lay_out([*original[:-1], draw.choice(sentences)])
        else:
            document = _draw_original(sentences, draw)
            originals.append(document)
            yield _lay_out(document)


def _draw_original(sentences: Sequence[str], draw: random.Random) -> list[str]:
    """Draw sentences; the last is short, so that the document stays a near-duplicate of itself without it."""
    size = draw.uniform(0.5, 1.5) * DOCUMENT_CHARACTERS
    document: list[str] = []
    while sum(map(len, document)) < size:
        document.append(draw.choice(sentences))
    words = sum(len(sentence.split()) for sentence in document)
    last = draw.choice(sentences)
    while len(last.split()) > LONGEST_REPLACED * words:
        last = draw.choice(sentences)
    return [*document, last]


def _lay_out(document: Sequence[str]) -> str:
    starts = range(0, len(document), SENTENCES_PER_PARAGRAPH)
    return "\n\n".join(" ".join(document[start : start + SENTENCES_PER_PARAGRAPH]) for start in starts)
