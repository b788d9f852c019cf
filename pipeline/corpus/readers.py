"""Read files as sections, unchanged: separated documents, rows, or blocks of running text."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.encoding import detect_encoding
from pipeline.corpus.pieces import ends_sentence
from pipeline.corpus.wrapping import find_breaks, find_wrap
from pipeline.errors import UserError
from pipeline.params.prepare import PrepareParams

TEXT_ENDINGS = (".txt", ".md")
ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".csv", ".parquet")
DATA_CARD = "README.md"
"""The file at the top of the data folder that describes the data, and is not part of it."""

BLOCK_CHARACTERS = 1_000_000
"""The approximate size of the blocks of running text, so that one huge file fits in memory and keeps all cores busy."""

_MAX_FIELD_CHARACTERS = 2**31 - 1  # by default, csv refuses fields above 131,072; the limit is a C long
# Project Gutenberg's own lines: `*** START OF THE PROJECT GUTENBERG EBOOK …`, older ones with THIS and ETEXT, and the
# oldest `End of Project Gutenberg's …`; `*** END OF PART ONE ***` is text. The bundled tales have a pair of their own.
_GUTENBERG = r"OF\s+(?:TH(?:E|IS)\s+)?PROJECT\s+GUTENBERG\b"
_VOLUME = r"OF THIS VOLUME \*{3}$"
_START = re.compile(rf"\s*\*{{3}}\s*START\s+{_GUTENBERG}|\*{{3}} START (?P<volume>{_VOLUME})", re.IGNORECASE)
_END = re.compile(rf"\s*(?:\*{{3}}\s*END|(?-i:End))\s+{_GUTENBERG}", re.IGNORECASE)
_END_OF_VOLUME = re.compile(rf"\*{{3}} END {_VOLUME}")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a file."""

    text: str
    title: str = ""
    running: bool = False
    """Whether it is part of a text without separators, which is still to be cut into pieces."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and the findings of a first pass over it."""

    path: Path
    name: str
    """The path relative to the data folder, with `/`."""
    encoding: str | None
    """The codec; None for Parquet, which states its own."""
    form: Literal["separated", "running", "rows"]
    """The kind of file: text with separators, text without, or rows of JSON lines, CSV and Parquet."""
    begins_with_notice: bool = False
    """Whether the first of Project Gutenberg's lines is a START; the lines before it are a notice."""
    notices: int = 0
    """The number of notices, before a START or after an END line."""
    notice_characters: int = 0
    """The number of characters of these notices, markers included."""
    separator_characters: int = 0
    """The number of characters of the lines that separate documents."""
    wrap_columns: int | None = None
    """The column at which the file's lines are wrapped; None if they are not."""
    characters: int = 0
    """The number of characters of all its sections."""


def find_files(data: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, ordered by relative path, except hidden ones and the data card.

    Raises `UserError` if there are none, or one has an ending that no reader knows.
    """
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; put text files there and run `dvc add {data}`")
    files = []
    for folder, folders, names in os.walk(data, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*names, *(name for name in folders if Path(folder, name).is_symlink())):
            path = Path(folder, name)
            if name.startswith(".") or path == data / DATA_CARD:
                continue
            if not path.is_file():
                raise UserError(f"{path}: not a file; replace the link by a copy")
            if path.suffix.lower() not in ENDINGS:
                raise UserError(f"{path}: not an input format ({', '.join(ENDINGS)}); convert or remove it")
            files.append(path)
    if not files:
        raise UserError(f"{data}: contains no text; put files ({', '.join(ENDINGS)}) there and run `dvc add {data}`")
    return sorted(files, key=lambda path: path.relative_to(data).as_posix())


def survey(path: Path, name: str, params: PrepareParams) -> Source:
    """Read a file once, check all of it, and find what reading its sections needs. Raises `UserError` for bad files."""
    is_text = path.suffix.lower() in TEXT_ENDINGS
    encoding = None if path.suffix.lower() == ".parquet" else detect_encoding(path)
    source = Source(path, name, encoding, "running" if is_text else "rows")
    if is_text:
        marks = (bool(_START.match(line)) for line in _read_lines(source) if _START.match(line) or _END.match(line))
        source = replace(source, begins_with_notice=next(marks, False))
        notices = notice_characters = separator_characters = 0
        was_body = True
        for line, is_body in _mark_lines(source):
            notices += was_body and not is_body
            was_body = is_body
            if not is_body:
                notice_characters += len(line)
            elif _is_separator(line, params.separator):
                separator_characters += len(line)
        source = replace(
            source,
            form="separated" if separator_characters else "running",
            notices=notices,
            notice_characters=notice_characters,
            separator_characters=separator_characters,
        )
    characters = 0
    breaks: Counter[tuple[int, int]] = Counter()
    for section in read_sections(source, params):
        characters += len(section.text)
        breaks.update(find_breaks(section.text))
    return replace(source, wrap_columns=find_wrap(breaks), characters=characters)


def read_sections(source: Source, params: PrepareParams) -> Iterator[Section]:
    """Yield a file's sections in order. Raises `UserError` naming the file and line that cannot be read."""
    match source.form, source.path.suffix.lower():
        case "separated", _:
            yield from _split_at_separators(_read_body(source), params.separator)
        case "running", _:
            yield from _cut_blocks(_read_body(source))
        case _, ".jsonl":
            yield from _read_jsonl(source, params)
        case _, ".csv":
            yield from _read_csv(source, params)
        case _:
            yield from _read_parquet(source, params)


def _raise(error: OSError) -> None:
    raise error


def _read_lines(source: Source) -> Iterator[str]:
    """Yield the lines of a text file, each with its end, so that no character is lost between them."""
    with source.path.open(encoding=source.encoding) as file:
        yield from file


def _mark_lines(source: Source) -> Iterator[tuple[str, bool]]:
    """Yield each line of a text file, and whether it belongs to the body rather than to a notice."""
    inside, end = not source.begins_with_notice, _END
    is_open = False
    for line in _read_lines(source):
        is_closed = line.rstrip().endswith("***")
        start = _START.match(line)
        if start:
            end = _END_OF_VOLUME if start["volume"] else _END
        inside = bool(start) or (inside and not end.match(line))
        # A long title ends on the line after START.
        yield line, inside and not start and not (is_open and is_closed)
        is_open = bool(start) and not is_closed


def _read_body(source: Source) -> Iterator[str]:
    return (line for line, is_body in _mark_lines(source) if is_body)


def _is_separator(line: str, separator: str) -> bool:
    return re.fullmatch(separator, line.strip()) is not None


def _split_at_separators(lines: Iterable[str], separator: str) -> Iterator[Section]:
    part: list[str] = []
    for line in lines:
        if _is_separator(line, separator):
            yield Section("".join(part))
            part = []
        else:
            part.append(line)
    yield Section("".join(part))


def _cut_blocks(lines: Iterable[str]) -> Iterator[Section]:
    block: list[str] = []
    characters = 0
    before = ""  # the last line that is not blank
    for line in lines:
        # A paragraph split by a page mark has to stay in one block, so a block ends only after a sentence; a text
        # without paragraphs is cut anyway, at twice the size.
        is_full = characters >= BLOCK_CHARACTERS and not line.strip() and ends_sentence(before)
        if is_full or characters >= 2 * BLOCK_CHARACTERS:
            yield Section("".join(block), running=True)
            block, characters = [], 0
        block.append(line)
        characters += len(line)
        before = line if line.strip() else before
    yield Section("".join(block), running=True)


def _read_jsonl(source: Source, params: PrepareParams) -> Iterator[Section]:
    for number, line in enumerate(_read_lines(source), start=1):
        if not line.strip():
            continue
        place = f"{source.path}:{number}"
        try:
            row = json.loads(line.removesuffix("\n"))
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno}); repair the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: contains {row!r:.40}, must be an object with the key {params.text_column!r}")
        _check_column(place, list(row), params)
        yield _make_section(place, row[params.text_column], row.get(params.title_column), params)


def _read_csv(source: Source, params: PrepareParams) -> Iterator[Section]:
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    with source.path.open(encoding=source.encoding, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, [])
            _check_column(f"{source.path}:1", columns, params)
            for values in reader:
                if not values:  # a blank line
                    continue
                place = f"{source.path}:{reader.line_num}"
                if len(values) != len(columns):
                    raise UserError(
                        f"{place}: {len(values)} fields where the header has {len(columns)}; quote fields with commas"
                    )
                row = dict(zip(columns, values, strict=True))
                yield _make_section(place, row[params.text_column], row.get(params.title_column), params)
        except csv.Error as error:
            raise UserError(f"{source.path}:{reader.line_num}: not CSV ({error}); repair the quotes") from error


def _read_parquet(source: Source, params: PrepareParams) -> Iterator[Section]:
    try:
        with pq.ParquetFile(source.path) as file:
            columns = file.schema_arrow.names
            _check_column(str(source.path), columns, params)
            wanted = [name for name in (params.text_column, params.title_column) if name in columns]
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{source.path}: row {number}"
                    yield _make_section(place, row[params.text_column], row.get(params.title_column), params)
    except pa.ArrowException as error:
        message = str(error).splitlines()[0]
        raise UserError(f"{source.path}: not a readable Parquet file ({message}); write it again") from error


def _check_column(place: str, columns: list[str], params: PrepareParams) -> None:
    if params.text_column not in columns:
        present = ", ".join(columns) or "none"
        raise UserError(
            f"{place}: no column {params.text_column!r}; present: {present}; name the right one in prepare.text_column"
        )


def _make_section(place: str, text: Any, title: Any, params: PrepareParams) -> Section:
    for column, value in ((params.text_column, text), (params.title_column, title)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: {column} is {value!r:.40}, must be text")
    return Section(text or "", title or "")
