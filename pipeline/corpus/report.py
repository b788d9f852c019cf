"""The report of `prepare`: every input row has one outcome, and every character is kept or dropped by a named rule."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.corpus.cleaning import Repair, Repairs
from pipeline.corpus.readers import Source
from pipeline.corpus.splits import SPLITS, Split
from pipeline.files import write_json

Outcome = Literal["kept", "empty", "fragment", "exact_duplicate", "near_duplicate"]
DROPPED = tuple(outcome for outcome in get_args(Outcome) if outcome != "kept")
_SHOWN = {"notices": "notices", "front_matter": "front matter", "markup": "markup"}
_MAX_NAMES = 3
"""The most files that the summary names as those with markup, and as those in each encoding."""


@dataclass(slots=True)
class FileReport:
    """The counts of one file. Its rows are the sum of the outcomes, so none is lost."""

    source: Source
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    characters: Counter[Outcome] = field(default_factory=Counter)
    """The characters of the rows by outcome, after the repairs."""
    repairs: Repairs = field(default_factory=Repairs)

    @property
    def notices(self) -> int:
        """The number of Project Gutenberg's notices, and of those that cleaning removed."""
        return self.source.notices + self.repairs.notices

    def add(self, outcome: Outcome, characters: int) -> None:
        """Count a row."""
        self.outcomes[outcome] += 1
        self.characters[outcome] += characters

    def count_characters(self) -> dict[str, Any]:
        """Return the characters that were read, those kept, and those that each rule dropped: kept and dropped add up.

        They are those of a text file, with a line end as one character, or those of the column of the text.
        """
        source = self.source
        dropped = {"separators": source.separator_characters}
        dropped |= {repair: self.repairs.removed[repair] for repair in get_args(Repair)}
        dropped["notices"] += source.notice_characters
        dropped["front_matter"] = source.front_matter_characters
        dropped |= {outcome: self.characters[outcome] for outcome in DROPPED}
        read = source.characters + source.separator_characters + source.notice_characters
        read += source.front_matter_characters
        return {"read": read, "kept": self.characters["kept"], "dropped": dropped}

    def to_json(self) -> dict[str, Any]:
        """Return the entry for report.json."""
        return {
            "encoding": self.source.encoding,
            "form": self.source.form,
            **_count_rows(self.outcomes),
            "characters": self.count_characters(),
            "notices": self.notices,
            "page_marks": self.repairs.page_marks,
            "wrap_columns": self.source.wrap_columns,
            "joined_line_breaks": self.repairs.joined_breaks,
        }


@dataclass(slots=True)
class SplitReport:
    """The size of a split."""

    documents: int = 0
    words: int = 0
    bytes: int = 0
    """The size of the texts in UTF-8."""

    def add(self, words: int, text_bytes: int) -> None:
        """Count a document."""
        self.documents += 1
        self.words += words
        self.bytes += text_bytes

    def to_json(self) -> dict[str, int]:
        """Return the entry for report.json."""
        return {"documents": self.documents, "words": self.words, "bytes": self.bytes}


@dataclass(slots=True)
class Report:
    """The whole report.json; totals are sums of the files' counts."""

    files: list[FileReport]
    splits: dict[Split, SplitReport] = field(default_factory=lambda: {split: SplitReport() for split in SPLITS})

    @property
    def outcomes(self) -> Counter[Outcome]:
        """The outcomes of all rows of all files."""
        return sum((file.outcomes for file in self.files), Counter[Outcome]())

    def describe_dropped(self, *, zeros: bool = True) -> str:
        """Return what was dropped, by reason, with or without the reasons that dropped nothing."""
        outcomes = self.outcomes
        counts = [(outcomes[outcome], outcome.replace("_", " ")) for outcome in DROPPED]
        rows = [f"{count} {name}" for count, name in counts if count or zeros]
        characters = Counter[str]()
        for file in self.files:
            characters.update(file.count_characters()["dropped"])
        # Of the repairs, only those that can remove what belongs to the text.
        removed = [f"{characters[rule]:,} characters of {name}" for rule, name in _SHOWN.items() if characters[rule]]
        if characters["markup"]:
            removed[-1] += f" ({self._name_markup_files()})"
        return ", ".join([*rows, *removed]) or "nothing"

    def _name_markup_files(self) -> str:
        """Return the files from which most markup was removed, with its characters."""
        by_file = Counter(
            {file.source.name: file.repairs.removed["markup"] for file in self.files if file.repairs.removed["markup"]}
        )
        names = [f"{name} {count:,}" for name, count in by_file.most_common(_MAX_NAMES)]
        return ", ".join(names) + (f" and {len(by_file) - _MAX_NAMES} more" if len(by_file) > _MAX_NAMES else "")

    def describe_encodings(self) -> str | None:
        """Return the files that are not UTF-8, by encoding; None if all are."""
        files: dict[str, list[str]] = {}
        for file in self.files:
            if file.source.encoding not in (None, "utf-8", "utf-8-sig"):
                files.setdefault(str(file.source.encoding), []).append(file.source.name)
        lists = []
        for encoding, names in sorted(files.items()):
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            lists.append(f"{encoding}: {', '.join(names[:_MAX_NAMES])}{more}")
        return "; ".join(lists) or None

    def write(self, path: Path) -> None:
        """Write report.json, a file's entry at a time: there may be as many files as documents."""
        value = {
            **_count_rows(self.outcomes),
            "notices": sum(file.notices for file in self.files),
            "page_marks": sum(file.repairs.page_marks for file in self.files),
            "splits": self.splits,
            "files": {file.source.name: file for file in self.files},
        }
        write_json(path, value, lambda part: part.to_json())


def _count_rows(outcomes: Counter[Outcome]) -> dict[str, Any]:
    dropped = {outcome: outcomes[outcome] for outcome in DROPPED}
    return {"rows": outcomes.total(), "kept": outcomes["kept"], "dropped": dropped}
