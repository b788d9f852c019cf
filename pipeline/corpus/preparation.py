"""From the files of a folder to clean documents in three splits, each document once."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path

from pipeline.corpus.deduplication import Deduplicator
from pipeline.corpus.documents import Candidate, CleanedSection, clean_section
from pipeline.corpus.parallel import map_in_order
from pipeline.corpus.readers import Section, Source, find_files, read_sections, survey
from pipeline.corpus.report import FileReport, Report
from pipeline.corpus.splits import SPLITS, choose_split
from pipeline.errors import UserError
from pipeline.files import whole_folder, write_json
from pipeline.params.prepare import PrepareParams
from pipeline.progress import progress

PARALLEL_CHARACTERS = 2_000_000
"""The size of a corpus from which several processes gain more than starting them costs."""
CHUNK_CHARACTERS = 200_000
"""The approximate size of the chunks of sections that a process gets."""

Chunk = list[tuple[int, int | None, Section]]
"""Sections, each with the position of its file and the column at which the file wraps lines."""


def prepare(data: Path, out: Path, params: PrepareParams, *, workers: int | None = None) -> Report:
    """Write `{train,validation,test}.jsonl` and `report.json` to the folder `out`.

    A document has `id` (first 16 hexadecimal digits of its words' SHA-256), `title`, `text`, and `source`: file and
    row, such as `volume-2.jsonl:17`. Rows count from 1 in each file, dropped ones included; the header of a CSV and
    blank lines of JSON lines do not count. The rows of a text file are its separated documents or the pieces it was cut
    into. `workers` is the number of processes, by default one per core for larger corpora; it does not change the
    output. Raises `UserError` if a file cannot be read, which leaves `out` as it
    was, or if a split would be empty, which leaves only the report.
    """
    paths = find_files(data)
    _check_patterns([path.relative_to(data).as_posix() for path in paths], params)
    sources = [
        survey(path, path.relative_to(data).as_posix(), params)
        for path in progress(paths, description="reading", unit="file")
    ]
    characters = sum(source.characters for source in sources)
    if workers is None:
        workers = (os.cpu_count() or 1) if characters >= PARALLEL_CHARACTERS else 1
    report = Report([FileReport(source) for source in sources])
    deduplicator = Deduplicator(params.near_duplicate)
    with whole_folder(out) as folder:
        with ExitStack() as stack:
            files = {
                split: stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8")) for split in SPLITS
            }
            for file, row_name, candidate in _clean_rows(report, params, workers, characters):
                if candidate.fault:
                    file.add(candidate.fault, candidate.text)
                    continue
                repeat = deduplicator.admit(row_name, candidate.digest, candidate.shingles, candidate.signature)
                if repeat:
                    file.add(repeat.reason, candidate.text)
                    report.add_duplicate(row_name, repeat)
                    continue
                file.add("kept", candidate.text)
                split = choose_split(
                    candidate.digest, validation_share=params.validation_share, test_share=params.test_share
                )
                report.splits[split].add(candidate.text)
                document = {
                    "id": candidate.digest.hex()[:16],
                    "title": candidate.title,
                    "text": candidate.text,
                    "source": row_name,
                }
                files[split].write(json.dumps(document, ensure_ascii=False) + "\n")
        empty = [split for split, size in report.splits.items() if size.documents == 0]
        if empty:
            for split in SPLITS:
                (folder / f"{split}.jsonl").unlink()
        write_json(folder / "report.json", report.to_json())
    if empty:
        raise UserError(
            f"{data}: {report.outcomes['kept']} documents of {report.outcomes.total()} rows, too few to split: "
            f"{', '.join(empty)} would be empty; dropped {report.describe_dropped(zeros=False)} (by file: "
            f"{out / 'report.json'}); add text, cut it smaller (prepare.piece_words; .md files: rename to .txt), "
            "lower prepare.minimum_words, or raise prepare.validation_share and prepare.test_share"
        )
    return report


def _check_patterns(names: list[str], params: PrepareParams) -> None:
    if not isinstance(params.encoding, dict):
        return
    for pattern in params.encoding:
        if pattern not in names and not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"prepare.encoding: {pattern!r} matches no file of the data; names: {', '.join(names[:5])}")


def _clean_rows(
    report: Report, params: PrepareParams, workers: int, characters: int
) -> Iterator[tuple[FileReport, str, Candidate]]:
    """Yield every row in order, with its file and its name; add what cleaning repaired to the file's counts."""
    sources = [file.source for file in report.files]
    chunks = map_in_order(partial(_clean_chunk, params), _read_chunks(sources, params), workers)
    numbers = Counter[str]()
    with progress(total=characters, description="cleaning", unit="character", unit_scale=True) as bar:
        for position, section_characters, cleaned in chain.from_iterable(chunks):
            file = report.files[position]
            file.page_marks += cleaned.page_marks
            file.notices += cleaned.notices
            file.joined_breaks += cleaned.joined_breaks
            file.removed.update(cleaned.removed)
            for candidate in cleaned.candidates:
                numbers[file.source.name] += 1
                yield file, f"{file.source.name}:{numbers[file.source.name]}", candidate
            bar.update(section_characters)


def _read_chunks(sources: list[Source], params: PrepareParams) -> Iterator[Chunk]:
    chunk: Chunk = []
    characters = 0
    for position, source in enumerate(sources):
        for section in read_sections(source, params):
            chunk.append((position, source.wrap_columns, section))
            characters += len(section.text)
            if characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    yield chunk


def _clean_chunk(params: PrepareParams, chunk: Chunk) -> list[tuple[int, int, CleanedSection]]:
    """Return for each section the position of its file, its characters before cleaning, and the cleaned section."""
    return [
        (position, len(section.text), clean_section(section, wrap_columns, params))
        for position, wrap_columns, section in chunk
    ]
