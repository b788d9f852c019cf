"""Find exact and near-duplicates among more documents than memory holds; only the first in the order of rows is kept.

A first pass notes for each row a number that its exact duplicates share, and keys that near-duplicates share. Sorting
brings equal ones together. A second pass goes through the rows in order: a row that shares no key is kept unseen, and
any other is compared exactly with the kept rows with which it shares one. Memory does not grow with the rows: what
grows is in files, of which each pass reads a part at a time.
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.similarity import Hashes, jaccard, mix
from pipeline.corpus.sorting import ExternalSort, Numbers

BATCH_ROWS = 1 << 13
"""The rows of which the keys are read at a time."""
BUCKET_NUMBERS = 4
"""The numbers of a bucket that are read at once; few have more."""
_VERDICT = struct.Struct("<Qd")  # the kept row that a row repeats, and their similarity; zeros for other rows


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
        # Read and written in places rather than mapped: mapped files count as memory.
        self._kept = _open_zeros(self._folder / "kept", 8 * places)
        self._verdicts = _open_zeros(self._folder / "verdicts", _VERDICT.size * self._rows)
        self._shingles = FileIO(self._folder / "shingles", "w+")
        self._shingles_end = 0

    def relate(self, stop: int) -> Relations:
        """Return the relations of the rows from the last call's `stop` on, up to this one."""
        rows, firsts = self._firsts.take(stop)
        buckets: dict[int, list[int]] = {}
        for row, place in zip(*(column.tolist() for column in self._buckets.take(stop)), strict=True):
            buckets.setdefault(row, []).append(place)
        return Relations(dict(zip(rows.tolist(), firsts.tolist(), strict=True)), buckets)

    def admit(self, row: int, relations: Relations, shingles: Hashes | None) -> Repeat | None:
        """Keep a row, or return the first kept row that it repeats. `shingles` is given if the row is in buckets."""
        first = relations.first.get(row)
        if first is not None:
            kept, similarity = _VERDICT.unpack(os.pread(self._verdicts.fileno(), _VERDICT.size, _VERDICT.size * first))
            if not similarity:
                return Repeat("exact_duplicate", first, 1.0)
            return Repeat("near_duplicate", kept, similarity)
        if shingles is None:
            return None
        buckets = {place: self._read_bucket(place) for place in relations.buckets[row]}
        for offset in sorted(set().union(*buckets.values())):
            kept, kept_shingles = self._read_shingles(offset)
            similarity = jaccard(shingles, kept_shingles)
            if similarity >= self._min_jaccard:
                os.pwrite(self._verdicts.fileno(), _VERDICT.pack(kept, similarity), _VERDICT.size * row)
                return Repeat("near_duplicate", kept, similarity)
        for place, offsets in buckets.items():
            bucket = struct.pack(f"<{len(offsets) + 2}Q", len(offsets) + 1, *offsets, self._shingles_end)
            os.pwrite(self._kept.fileno(), bucket, 8 * place)
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

        A bucket is the place of a count, with places for as many rows behind it. Rows that share several keys, and with
        no other row, are in one bucket.
        """
        by_key = ExternalSort(self._folder / "by_key")
        for noted in self._read_keys():
            on_progress(len(noted))
            noted = noted[~is_later.has(noted[:, 0])]
            by_key.add(noted[:, 1:].ravel(), np.repeat(noted[:, 0], self._bands))
        (self._folder / "keys").unlink()
        by_members = ExternalSort(self._folder / "by_members")
        for keys, rows in by_key.blocks():
            members, starts = _group(keys, rows)
            by_members.add(_hash_members(members, starts), members)
        by_key.remove()
        buckets, places = ExternalSort(self._folder / "buckets"), 0
        for hashes, rows in by_members.blocks():
            members, starts = _group(hashes, rows)
            rank = np.cumsum(starts == np.arange(len(starts))) - 1
            buckets.add(members, (places + starts + rank).astype(np.uint64))
            places += len(members) + (int(rank[-1]) + 1 if len(rank) else 0)
        by_members.remove()
        return buckets, places

    def _read_keys(self) -> Iterator[Numbers]:
        with (self._folder / "keys").open("rb") as file:
            while len(numbers := np.fromfile(file, "<u8", BATCH_ROWS * (1 + self._bands))):
                yield numbers.reshape(-1, 1 + self._bands)

    def _read_bucket(self, place: int) -> list[int]:
        """Return where the shingles of the kept rows of a bucket begin."""
        count, *offsets = _unpack(os.pread(self._kept.fileno(), 8 * BUCKET_NUMBERS, 8 * place))
        if count > len(offsets):
            offsets = _unpack(os.pread(self._kept.fileno(), 8 * count, 8 * (place + 1)))
        return offsets[:count]

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
    """Return the rows of sorted keys that occur more than once, by key and row, and where the group of each starts.

    A row is in a group once.
    """
    is_same = keys[1:] == keys[:-1]
    is_member = np.zeros(len(keys), bool)
    is_member[1:] |= is_same
    is_member[:-1] |= is_same
    keys, rows = keys[is_member], rows[is_member]
    order = np.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    is_other = _differs(keys) | _differs(rows)
    keys, rows = keys[is_other], rows[is_other]
    starts = np.flatnonzero(_differs(keys))
    return rows, np.repeat(starts, np.diff(starts, append=len(keys)))


def _differs(values: Numbers) -> NDArray[np.bool_]:
    """Return which values are not those before them."""
    return np.concatenate((np.ones(min(1, len(values)), bool), values[1:] != values[:-1]))


def _hash_members(members: Numbers, starts: NDArray[np.int64]) -> Numbers:
    """Return for each member a hash of the members of its group."""
    firsts, group = np.unique(starts, return_inverse=True)
    if not len(members):
        return members
    # Not of row 0 itself, which hashes to 0 and so would not count.
    return np.add.reduceat(mix(members + np.uint64(1)), firsts)[group]


def _open_zeros(path: Path, size_bytes: int) -> FileIO:
    """Return a new file of zeros. Its space is taken now, so that a full disk shows early."""
    file = FileIO(path, "w+")
    os.posix_fallocate(file.fileno(), 0, max(1, size_bytes))
    return file


def _unpack(numbers: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(numbers) // 8}Q", numbers))
