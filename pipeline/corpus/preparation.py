"""From the files of a folder to clean documents in three splits, each document once."""

import json
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.deduplication import Deduplicator, Relations
from pipeline.corpus.documents import FAULTS, ROW, Chunk, clean_chunk, end_line, shingles_of
from pipeline.corpus.encoding import ignore
from pipeline.corpus.parallel import MapInOrder, open_executor
from pipeline.corpus.readers import Source, find_files, read_sections, survey
from pipeline.corpus.report import FileReport, Report
from pipeline.corpus.similarity import Hashes, choose_bands
from pipeline.corpus.splits import SPLITS
from pipeline.errors import UserError
from pipeline.files import temporary_folder, whole_folder
from pipeline.params.prepare import PrepareParams
from pipeline.progress import progress

PARALLEL_BYTES = 2_000_000
"""The size of a corpus from which several processes gain more than starting them costs."""
CHUNK_CHARACTERS = 200_000
"""The approximate size of the chunks of sections that a process gets."""
BLOCK_BYTES = 1 << 20
"""The approximate size of the blocks of rows that are written at a time."""
BLOCK_ROWS = 1 << 12
"""The most rows of a block."""
DUPLICATES_FILE = "duplicates.jsonl"


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that follow one another."""

    start: int
    rows: NDArray[Any]
    lines: list[bytes]
    """The beginning of each row's line; empty for a fault."""
    relations: Relations

    @property
    def compared(self) -> list[int]:
        """The rows that may be near-duplicates, by number."""
        return [row for row in self.relations.buckets if row not in self.relations.first]


def prepare(data: Path, out: Path, params: PrepareParams, *, workers: int | None = None) -> Report:
    """Write `{train,validation,test}.jsonl`, `duplicates.jsonl` and `report.json` to the folder `out`.

    A document has `id` (first 16 hexadecimal digits of its words' SHA-256), `title`, `text`, and `source`: file and
    row, such as `volume-2.jsonl:17`. Rows count from 1 in each file, dropped ones included; the header of a CSV and
    blank lines of JSON lines do not count. The rows of a text file are its separated documents or the pieces it was cut
    into. A line of `duplicates.jsonl` is a dropped row, the kept row that it repeats, and how alike they are. `workers`
    is the number of processes, by default one per core for larger corpora; it does not change the output.

    Memory does not grow with the text: cleaned rows and what is compared wait in temporary files, of about twice the
    size of the text. Raises `UserError` if a file cannot be read, which leaves `out` as it was, or if a split would be
    empty, which leaves only the report.
    """
    paths = find_files(data)
    _check_patterns([path.relative_to(data).as_posix() for path in paths], params)
    if workers is None:
        workers = (os.cpu_count() or 1) if sum(path.stat().st_size for path in paths) >= PARALLEL_BYTES else 1
    with open_executor(params.executor, workers) as map_in_order, whole_folder(out) as folder:
        report = Report([FileReport(source) for source in _survey(data, paths, params, map_in_order)])
        with temporary_folder(out, params.temporary_folder) as temporary:
            bands, _ = choose_bands(params.near_duplicate.permutations, params.near_duplicate.jaccard)
            deduplicator = Deduplicator(temporary, bands=bands, min_jaccard=params.near_duplicate.jaccard)
            file_rows = _clean(report, params, map_in_order, deduplicator, temporary)
            with progress(description="comparing", total=sum(file_rows), unit="row", unit_scale=True) as bar:
                deduplicator.compare(bar.update)
            _write(report, params, map_in_order, deduplicator, file_rows, temporary, folder)
        empty = [split for split, size in report.splits.items() if size.documents == 0]
        if empty:
            for name in (*(f"{split}.jsonl" for split in SPLITS), DUPLICATES_FILE):
                (folder / name).unlink()
        report.write(folder / "report.json")
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


def _survey(data: Path, paths: list[Path], params: PrepareParams, map_in_order: MapInOrder) -> Iterator[Source]:
    """Yield what a first pass over each file finds."""
    sizes = [path.stat().st_size for path in paths]
    with progress(description="reading", total=sum(sizes), unit="B", unit_scale=True) as bar:
        one_file = partial(_survey_file, data, params)
        if len(paths) > 1:
            sources = map_in_order(one_file, paths)
        else:  # perhaps a large one: the bar moves within it
            sources = iter([one_file(paths[0], lambda count: bar.update(min(count / 2, max(0, sizes[0] - bar.n))))])
        done = 0
        for path, size, source in zip(paths, sizes, sources, strict=True):
            yield replace(source, path=path)  # not the copy that a process sent: there may be a million
            done += size
            bar.update(done - bar.n)


def _survey_file(data: Path, params: PrepareParams, path: Path, on_read: Callable[[int], object] = ignore) -> Source:
    return survey(path, path.relative_to(data).as_posix(), params, on_read)


def _clean(
    report: Report, params: PrepareParams, map_in_order: MapInOrder, deduplicator: Deduplicator, temporary: Path
) -> list[int]:
    """Write all rows to temporary files, note what is compared, and return the number of rows of each file."""
    sources = [file.source for file in report.files]
    chunks = map_in_order(partial(clean_chunk, params), _read_chunks(sources, params))
    file_rows = [0] * len(sources)
    characters = sum(source.characters for source in sources)
    row_count = 0
    with (
        (temporary / "rows").open("wb") as rows_file,
        (temporary / "lines").open("wb") as lines_file,
        progress(description="cleaning", total=characters, unit="character", unit_scale=True) as bar,
    ):
        for chunk in chunks:
            rows_file.write(chunk.rows.data)
            lines_file.write(chunk.lines)
            is_document = chunk.rows["fault"] == 0
            numbers = row_count + np.flatnonzero(is_document).astype(np.uint64)
            deduplicator.note(numbers, chunk.rows["id"][is_document], chunk.keys)
            row_count += len(chunk.rows)
            for part in chunk.parts:
                report.files[part.position].repairs.add(part.repairs)
                file_rows[part.position] += part.rows
                bar.update(part.characters)
    return file_rows


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


def _write(
    report: Report,
    params: PrepareParams,
    map_in_order: MapInOrder,
    deduplicator: Deduplicator,
    file_rows: list[int],
    temporary: Path,
    folder: Path,
) -> None:
    """Write the rows that are kept to their splits, and those that repeat others to the duplicates."""
    ends = list(accumulate(file_rows))

    def name(row: int) -> str:
        position = bisect_right(ends, row)
        return f"{report.files[position].source.name}:{row - ends[position] + file_rows[position] + 1}"

    with ExitStack() as stack:
        splits = [stack.enter_context((folder / f"{split}.jsonl").open("wb")) for split in SPLITS]
        duplicates = stack.enter_context((folder / DUPLICATES_FILE).open("w", encoding="utf-8"))
        bar = stack.enter_context(progress(description="writing", total=sum(file_rows), unit="row", unit_scale=True))
        for block, shingles in _compared_blocks(params, map_in_order, deduplicator, temporary):
            for row, (values, line) in enumerate(zip(block.rows.tolist(), block.lines, strict=True), start=block.start):
                fault, split, characters, words, text_bytes, _, _ = values
                file = report.files[bisect_right(ends, row)]
                if fault:
                    file.add(FAULTS[fault], characters)
                    continue
                repeat = deduplicator.admit(row, block.relations, shingles.get(row))
                if repeat:
                    file.add(repeat.reason, characters)
                    entry = {
                        "source": name(row),
                        "repeats": name(repeat.row),
                        "reason": repeat.reason,
                        "jaccard": round(repeat.jaccard, 4),
                    }
                    duplicates.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    continue
                file.add("kept", characters)
                report.splits[SPLITS[split]].add(words, text_bytes)
                splits[split].write(end_line(line, name(row)))
            bar.update(len(block.rows))


def _compared_blocks(
    params: PrepareParams, map_in_order: MapInOrder, deduplicator: Deduplicator, temporary: Path
) -> Iterator[tuple[_Block, dict[int, Hashes]]]:
    """Yield the blocks in order, each with the shingles of its rows that may be near-duplicates."""
    waiting: deque[_Block] = deque()

    def lines_to_compare() -> Iterator[list[bytes]]:
        for block in _read_blocks(deduplicator, temporary):
            waiting.append(block)
            yield [block.lines[row - block.start] for row in block.compared]

    compare = partial(shingles_of, params.near_duplicate.ngram_words)
    for shingles in map_in_order(compare, lines_to_compare()):
        block = waiting.popleft()
        yield block, dict(zip(block.compared, shingles, strict=True))


def _read_blocks(deduplicator: Deduplicator, temporary: Path) -> Iterator[_Block]:
    start = 0
    with (temporary / "rows").open("rb") as rows_file, (temporary / "lines").open("rb") as lines_file:
        while len(read := np.fromfile(rows_file, ROW, BLOCK_ROWS)):
            while len(read):
                count = 1 + int(np.searchsorted(np.cumsum(read["line_bytes"]), BLOCK_BYTES))
                rows, read = read[:count], read[count:]
                lines = [lines_file.read(size) for size in rows["line_bytes"].tolist()]
                yield _Block(start, rows, lines, deduplicator.relate(start + len(rows)))
                start += len(rows)
