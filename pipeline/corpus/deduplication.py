"""Find exact and near-duplicates among more documents than memory holds; only the first in the order of rows is kept.

A first pass notes for each row a number that its exact duplicates share, and keys that near-duplicates share. Sorting
brings equal ones together. A second pass goes through the rows in order: a row that shares no key is kept unseen, and
any other is compared exactly with the kept rows with which it shares one. Memory does not grow with the rows: what
grows is in files, of which each pass reads a part at a time.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.similarity import Hashes, jaccard
from pipeline.corpus.sorting import ExternalSort, Numbers

BATCH_ROWS = 1 << 13
"""The rows of which the keys are read at a time."""
MAPPED_ROWS = 1 << 18
"""The rows after which the parts of files that are in memory are let go."""
_VERDICT = np.dtype([("row", "<i8"), ("jaccard", "<f8")])


@dataclass(frozen=True, slots=True)
class Repeat:
    """The reason why a document is dropped, and the row that it repeats."""

    reason: Literal["exact_duplicate", "near_duplicate"]
    row: int
    jaccard: float
    """The similarity of the two sets of shingles; 1 for an exact duplicate."""


@dataclass(frozen=True, slots=True)
class Relations:
    """What rows that follow one another have in common with other rows."""

    first: dict[int, int]
    """By row: the first row with the same words; absent for that row itself."""
    buckets: dict[int, list[int]]
    """By row: the buckets that it is in, if its words are new. The rows of a bucket share a key."""


class Deduplicator:
    """Rows in order, of which some repeat others: `note` them all, `compare`, then `relate` and `admit` them all."""

    def __init__(self, folder: Path, *, bands: int, min_jaccard: float) -> None:
        """Keep what grows with the rows in `folder`, which exists. `bands` is the number of keys of a row."""
        self._folder = folder
        self._bands = bands
        self._min_jaccard = min_jaccard
        self._keys = (folder / "keys").open("wb")
        self._by_words = ExternalSort(folder / "by_words")
        self._rows = 0

    def note(self, rows: Numbers, words: Numbers, keys: Hashes) -> None:
        """Add rows that follow those before: numbers, the same for the same words, and keys, (rows, bands)."""
        self._by_words.add(words, rows)
        self._keys.write(np.column_stack((rows, keys)).astype("<u8", copy=False).data)
        self._rows = int(rows[-1]) + 1 if len(rows) else self._rows

    def compare(self, on_progress: Callable[[int], object]) -> None:
        """Bring together the rows that share words or keys. `on_progress` is called with rows that are done."""
        self._keys.close()
        firsts, is_later = self._find_firsts()
        buckets, places = self._fill_buckets(is_later, on_progress)
        self._firsts, self._buckets = _InOrder(firsts.blocks()), _InOrder(buckets.blocks())
        self._kept, kept = _map_array(self._folder / "kept", np.dtype("<u8"), places)
        self._verdicts, verdicts = _map_array(self._folder / "verdicts", _VERDICT, self._rows)
        self._maps = kept, verdicts
        self._related = 0
        self._shingles = (self._folder / "shingles").open("w+b", buffering=0)
        self._shingles_end = 0

    def relate(self, stop: int) -> Relations:
        """Return the relations of the rows from the last call's `stop` on, up to this one."""
        if stop // MAPPED_ROWS > self._related // MAPPED_ROWS:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)  # what was written stays in the file
        self._related = stop
        rows, firsts = self._firsts.take(stop)
        buckets: dict[int, list[int]] = {}
        for row, place in zip(*(column.tolist() for column in self._buckets.take(stop)), strict=True):
            buckets.setdefault(row, []).append(place)
        return Relations(dict(zip(rows.tolist(), firsts.tolist(), strict=True)), buckets)

    def admit(self, row: int, relations: Relations, shingles: Hashes | None) -> Repeat | None:
        """Keep a row, or return the first kept row that it repeats. `shingles` is given if the row is in buckets."""
        first = relations.first.get(row)
        if first is not None:
            verdict = self._verdicts[first]
            if not verdict["jaccard"]:
                return Repeat("exact_duplicate", first, 1.0)
            return Repeat("near_duplicate", int(verdict["row"]), float(verdict["jaccard"]))
        if shingles is None:
            return None
        buckets = relations.buckets[row]
        found: set[int] = set()
        for place in buckets:
            count = int(self._kept[place])
            if count:
                found.update(self._kept[place + 1 : place + 1 + count].tolist())
        for offset in sorted(found):
            kept, kept_shingles = self._read_shingles(offset)
            similarity = jaccard(shingles, kept_shingles)
            if similarity >= self._min_jaccard:
                self._verdicts[row] = kept, similarity
                return Repeat("near_duplicate", kept, similarity)
        for place in buckets:
            self._kept[place] += 1
            self._kept[place + int(self._kept[place])] = self._shingles_end
        self._append_shingles(row, shingles)
        return None

    def _find_firsts(self) -> tuple[ExternalSort, "_Bits"]:
        """Return the first row with the same words by each later row, and the set of the later rows."""
        firsts, is_later = ExternalSort(self._folder / "firsts"), _Bits(self._rows)
        for words, rows in self._by_words.blocks():
            members, starts = _group(words, rows)
            is_repeat = starts != np.arange(len(starts))
            firsts.add(members[is_repeat], members[starts[is_repeat]])
            is_later.add(members[is_repeat])
        self._by_words.remove()
        return firsts, is_later

    def _fill_buckets(self, is_later: "_Bits", on_progress: Callable[[int], object]) -> tuple[ExternalSort, int]:
        """Return the buckets by row, and the number of places that they take.

        A bucket is the place of a count, with places for as many rows behind it.
        """
        by_key = ExternalSort(self._folder / "by_key")
        for noted in self._read_keys():
            on_progress(len(noted))
            noted = noted[~is_later.has(noted[:, 0])]
            by_key.add(noted[:, 1:].ravel(), np.repeat(noted[:, 0], self._bands))
        (self._folder / "keys").unlink()
        buckets, places = ExternalSort(self._folder / "buckets"), 0
        for keys, rows in by_key.blocks():
            members, starts = _group(keys, rows)
            rank = np.cumsum(starts == np.arange(len(starts))) - 1
            buckets.add(members, (places + starts + rank).astype(np.uint64))
            places += len(members) + (int(rank[-1]) + 1 if len(rank) else 0)
        by_key.remove()
        return buckets, places

    def _read_keys(self) -> Iterator[Numbers]:
        with (self._folder / "keys").open("rb") as file:
            while len(numbers := np.fromfile(file, "<u8", BATCH_ROWS * (1 + self._bands))):
                yield numbers.reshape(-1, 1 + self._bands)

    def _append_shingles(self, row: int, shingles: Hashes) -> None:
        record = np.concatenate((np.array([row, len(shingles)], np.uint64), shingles)).astype("<u8", copy=False)
        self._shingles.write(record.data)
        self._shingles_end += record.nbytes

    def _read_shingles(self, offset: int) -> tuple[int, Hashes]:
        row, count = np.frombuffer(os.pread(self._shingles.fileno(), 16, offset), "<u8").tolist()
        return row, np.frombuffer(os.pread(self._shingles.fileno(), 8 * count, offset + 16), "<u8")


class _InOrder:
    """Pairs of a row and a value, taken in the order of the rows."""

    def __init__(self, blocks: Iterator[tuple[Numbers, Numbers]]) -> None:
        self._blocks = blocks
        self._rows = self._values = np.empty(0, np.uint64)

    def take(self, stop: int) -> tuple[Numbers, Numbers]:
        """Return the pairs of the rows before `stop` that were not taken yet."""
        parts = []
        while True:
            count = int(np.searchsorted(self._rows, stop))
            parts.append((self._rows[:count], self._values[:count]))
            self._rows, self._values = self._rows[count:], self._values[count:]
            block = next(self._blocks, None) if not len(self._rows) else None
            if block is None:
                rows, values = zip(*parts, strict=True)
                return np.concatenate(rows), np.concatenate(values)
            self._rows, self._values = block


class _Bits:
    """A set of rows, a bit each."""

    def __init__(self, rows: int) -> None:
        self._bytes = np.zeros(rows // 8 + 1, np.uint8)

    def add(self, rows: Numbers) -> None:
        np.bitwise_or.at(self._bytes, rows >> np.uint64(3), np.uint8(1) << (rows & np.uint64(7)).astype(np.uint8))

    def has(self, rows: Numbers) -> NDArray[np.bool_]:
        return (self._bytes[rows >> np.uint64(3)] >> (rows & np.uint64(7)).astype(np.uint8) & 1).astype(bool)


def _group(keys: Numbers, rows: Numbers) -> tuple[Numbers, NDArray[np.int64]]:
    """Return the rows of sorted keys that occur more than once, by key and row, and where the group of each starts."""
    is_same = keys[1:] == keys[:-1]
    is_member = np.zeros(len(keys), bool)
    is_member[1:] |= is_same
    is_member[:-1] |= is_same
    keys, rows = keys[is_member], rows[is_member]
    order = np.lexsort((rows, keys))
    keys = keys[order]
    is_first = np.concatenate((np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]))
    starts = np.flatnonzero(is_first)
    return rows[order], np.repeat(starts, np.diff(starts, append=len(keys)))


def _map_array(path: Path, dtype: np.dtype[np.generic], length: int) -> tuple[NDArray[Any], mmap.mmap]:
    """Return an array of zeros in a file. Its space on the disk is taken now: later, a full disk would be a signal."""
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, length) * dtype.itemsize)
        mapped = mmap.mmap(file.fileno(), 0)
    return np.frombuffer(mapped, dtype), mapped
