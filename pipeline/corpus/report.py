"""The report of `prepare`: every input row has one outcome, and every character is kept or dropped by a named rule."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pipeline.corpus.cleaning import Repair
from pipeline.corpus.deduplication import Repeat
from pipeline.corpus.readers import Source
from pipeline.corpus.splits import SPLITS, Split
from pipeline.corpus.words import count_words

Outcome = Literal["kept", "empty", "fragment", "exact_duplicate", "near_duplicate"]
DROPPED = tuple(outcome for outcome in get_args(Outcome) if outcome != "kept")


@dataclass(slots=True)
class FileReport:
    """The counts of one file. Its rows are the sum of the outcomes, so none is lost."""

    source: Source
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    characters: Counter[Outcome] = field(default_factory=Counter)
    """The characters of the rows by outcome, after the repairs."""
    removed: Counter[Repair] = field(default_factory=Counter)
    """The characters that each repair removed."""
    page_marks: int = 0
    notices: int = 0
    joined_breaks: int = 0

    def add(self, outcome: Outcome, text: str) -> None:
        """Count a row."""
        self.outcomes[outcome] += 1
        self.characters[outcome] += len(text)

    def count_characters(self) -> dict[str, Any]:
        """Return the characters that were read, those kept, and those that each rule dropped: kept and dropped add up.

        They are those of a text file, with a line end as one character, or those of the column of the text.
        """
        source = self.source
        dropped = {"separators": source.separator_characters}
        dropped |= {repair: self.removed[repair] for repair in get_args(Repair)}
        dropped["notices"] += source.notice_characters
        dropped |= {outcome: self.characters[outcome] for outcome in DROPPED}
        read = source.characters + source.separator_characters + source.notice_characters
        return {"read": read, "kept": self.characters["kept"], "dropped": dropped}

    def to_json(self) -> dict[str, Any]:
        """Return the entry for report.json."""
        return {
            "encoding": self.source.encoding,
            "form": self.source.form,
            **_count_rows(self.outcomes),
            "characters": self.count_characters(),
            "notices": self.source.notices + self.notices,
            "page_marks": self.page_marks,
            "wrap_columns": self.source.wrap_columns,
            "joined_line_breaks": self.joined_breaks,
        }


@dataclass(slots=True)
class SplitReport:
    """The size of a split."""

    documents: int = 0
    words: int = 0
    bytes: int = 0
    """The size of the texts in UTF-8."""

    def add(self, text: str) -> None:
        """Count a document."""
        self.documents += 1
        self.words += count_words(text)
        self.bytes += len(text.encode())

    def to_json(self) -> dict[str, int]:
        """Return the entry for report.json."""
        return {"documents": self.documents, "words": self.words, "bytes": self.bytes}


@dataclass(slots=True)
class Report:
    """The whole report.json; totals are sums of the files' counts."""

    files: list[FileReport]
    splits: dict[Split, SplitReport] = field(default_factory=lambda: {split: SplitReport() for split in SPLITS})
    duplicates: list[dict[str, Any]] = field(default_factory=list)

    def add_duplicate(self, source: str, repeat: Repeat) -> None:
        """Add a dropped document and the one that it repeats."""
        entry = {"source": source, "repeats": repeat.source, "reason": repeat.reason}
        self.duplicates.append({**entry, "jaccard": round(repeat.jaccard, 4)})

    @property
    def outcomes(self) -> Counter[Outcome]:
        """The outcomes of all rows of all files."""
        return sum((file.outcomes for file in self.files), Counter[Outcome]())

    def to_json(self) -> dict[str, Any]:
        """Return the entry for report.json."""
        files = {file.source.name: file.to_json() for file in self.files}
        return {
            **_count_rows(self.outcomes),
            **{name: sum(file[name] for file in files.values()) for name in ("notices", "page_marks")},
            "splits": {split: size.to_json() for split, size in self.splits.items()},
            "files": files,
            "duplicates": self.duplicates,
        }


def _count_rows(outcomes: Counter[Outcome]) -> dict[str, Any]:
    dropped = {outcome: outcomes[outcome] for outcome in DROPPED}
    return {"rows": outcomes.total(), "kept": outcomes["kept"], "dropped": dropped}
