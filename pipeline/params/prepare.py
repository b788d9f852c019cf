"""The section `prepare`: how files become documents."""

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.params.section import Count, Pattern, Section, Share


class NearDuplicateParams(Section):
    """Documents as alike as this are one: the first in file order stays."""

    ngram_words: Count
    """Words of a shingle."""
    jaccard: Share
    """Similarity of the two sets of shingles from which on documents count as the same."""
    permutations: Annotated[int, Field(ge=16)]
    """Hash functions of the MinHash that finds the candidates."""


class PrepareParams(Section):
    """How files become documents."""

    separator: Pattern
    """A line that matches this whole parts two documents of a text file."""
    piece_words: Count
    """A text without separators is cut at blank lines into pieces of about this many words."""
    minimum_words: Annotated[int, Field(ge=0)]
    """A separated document of fewer words is a fragment and dropped."""
    text_column: Annotated[str, Field(min_length=1)]
    """Column (CSV, Parquet) or key (JSON lines) that holds the text."""
    title_column: Annotated[str, Field(min_length=1)]
    """Column or key that holds the title, where there is one."""
    straighten_quotes: bool
    """Make curly quotes plain."""
    near_duplicate: NearDuplicateParams
    validation_share: Share
    """Of the documents, by hash of their content."""
    test_share: Share
    """Of the documents, by hash of their content."""

    @model_validator(mode="after")
    def _check_shares(self) -> "PrepareParams":
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on")
        return self
