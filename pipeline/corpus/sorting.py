"""Sort more pairs of numbers than memory holds: sorted runs in a file, read again in blocks of keys (external sort)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]

RUN_PAIRS = 1 << 21
"""The pairs that are sorted in memory, 32 MB, and about the size of a block."""
_SAMPLE_STEP = 1 << 10


class ExternalSort:
    """Pairs of a key and a value, which `blocks` returns in the order of the keys."""

    def __init__(self, path: Path) -> None:
        """Keep the pairs in the file `path`."""
        self._path = path
        self._file = path.open("wb")
        self._waiting: list[tuple[Numbers, Numbers]] = []
        self._waiting_pairs = 0
        self._runs: list[int] = []
        """The pairs of each run in the file: its keys, and then its values."""
        self._samples: list[Numbers] = []
        """Every `_SAMPLE_STEP`-th key of each run."""

    def add(self, keys: Numbers, values: Numbers) -> None:
        """Add pairs."""
        self._waiting.append((keys, values))
        self._waiting_pairs += len(keys)
        if self._waiting_pairs >= RUN_PAIRS:
            self._write_run()

    def blocks(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Yield all keys and values in the order of the keys, in blocks of about `RUN_PAIRS`.

        Equal keys are in one block, their values in any order.
        """
        self._write_run()
        self._file.close()
        if not self._runs:
            return
        step = max(1, RUN_PAIRS // _SAMPLE_STEP)
        bounds = np.unique(np.sort(np.concatenate(self._samples))[::step])
        starts: list[NDArray[np.int32]] = []
        offset = 0
        for pairs in self._runs:
            run_keys = np.memmap(self._path, "<u8", "r", offset, pairs)
            starts.append(np.array([0, *np.searchsorted(run_keys, bounds[1:]), pairs], np.int32))
            offset += 16 * pairs
        for block in range(len(bounds)):
            keys, values = self._read_block([own[block : block + 2].tolist() for own in starts])
            order = np.argsort(keys)
            yield keys[order], values[order]

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink()

    def _read_block(self, parts: list[list[int]]) -> tuple[Numbers, Numbers]:
        keys: list[Numbers] = []
        values: list[Numbers] = []
        offset = 0
        with self._path.open("rb") as file:
            for pairs, (start, stop) in zip(self._runs, parts, strict=True):
                for column, first in ((keys, offset), (values, offset + 8 * pairs)):
                    file.seek(first + 8 * start)
                    column.append(np.fromfile(file, "<u8", stop - start))
                offset += 16 * pairs
        return np.concatenate(keys), np.concatenate(values)

    def _write_run(self) -> None:
        if not self._waiting_pairs:
            return
        keys, values = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_pairs = [], 0
        order = np.argsort(keys)
        keys = keys[order]
        self._file.write(keys.astype("<u8", copy=False).data)
        self._file.write(values[order].astype("<u8", copy=False).data)
        self._runs.append(len(keys))
        self._samples.append(keys[::_SAMPLE_STEP].copy())
