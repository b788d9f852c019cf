"""The section `prepare`: how files become documents."""

import codecs
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from pipeline.params.section import Count, Pattern, Section, Share

Executor = Literal["local", "ray"]
_NO_ENCODINGS = ("charmap", "idna", "mbcs", "oem", "punycode", "raw-unicode-escape", "undefined", "unicode-escape")
"""The codecs of Python that take text but are not an encoding of files, or not the same on each machine."""


def _check_encodings(value: Any) -> Any:
    names = value.values() if isinstance(value, dict) else [] if value is None else [value]
    for file in value if isinstance(value, dict) else ():
        if not isinstance(file, str):
            raise ValueError(f"{file!r} is not the name of a file; put it in quotes")
    for name in names:
        try:
            "".encode(name)  # refuses codecs that are not encodings of text, such as base64
            if codecs.lookup(name).name in _NO_ENCODINGS:
                raise LookupError(name)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{name!r} is not an encoding, such as utf-8, windows-1251, koi8-r or cp932") from error
    return value


class NearDuplicateParams(Section):
    """When two documents are near-duplicates; only the first in file order is kept."""

    ngram_words: Count
    """The length of a shingle, in words."""
    jaccard: Share
    """The similarity of their sets of shingles from which documents count as near-duplicates."""
    permutations: Annotated[int, Field(ge=16)]
    """The number of hash functions of the MinHash that finds candidates."""


class PrepareParams(Section):
    """How files become documents."""

    encoding: Annotated[str | dict[str, str] | None, PlainValidator(_check_encodings)]
    """The encoding of all text, JSON lines and CSV files, or a mapping from files (relative paths, or patterns such as
    `russian/*.txt`) to encodings; the encodings of other files are detected. None if all are detected."""
    separator: Pattern
    """A regular expression. A line that matches it as a whole separates two documents of a text file; in Markdown,
    only between blank lines."""
    piece_words: Count
    """The approximate size of the pieces, in words, into which a `.txt` file without separators is cut at blank
    lines."""
    minimum_words: Annotated[int, Field(ge=0)]
    """The fewest words of a separated document or a row; a shorter one is dropped as a fragment."""
    text_column: Annotated[str, Field(min_length=1)]
    """The column (CSV, Parquet) or key (JSON lines) of the text."""
    title_column: Annotated[str, Field(min_length=1)]
    """The column or key of the title; it may be missing."""
    strip_markup: bool
    """Whether tags are removed from documents that are HTML, and entities decoded there and in escaped text."""
    straighten_quotes: bool
    """Whether curly quotes are replaced by straight ones."""
    near_duplicate: NearDuplicateParams
    executor: Executor
    """Where text is cleaned: on the cores of this machine, or of the Ray cluster at the address in `RAY_ADDRESS`. The
    documents are the same."""
    temporary_folder: Annotated[str, Field(min_length=1)] | None
    """The folder for temporary files, of about twice the size of the text; None for that of the output. An output that
    goes to an object store is written there first, or for None to `out/`."""
    validation_share: Share
    """The share of documents in the validation split, chosen by the hash of their content."""
    test_share: Share
    """The share of documents in the test split, chosen by the hash of their content."""

    @model_validator(mode="after")
    def _check_shares(self) -> "PrepareParams":
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on")
        return self
