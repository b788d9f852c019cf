"""An index of the training text in an engine, to look up quickly which tokens follow a run of tokens in it.

The index is a suffix array (Manber and Myers 1993): the positions of the text, sorted by the text that begins at each.
So all occurrences of a run are adjacent, and bisection finds them. A long text has an array for each block of whole
documents, as sorting needs memory for all that it sorts. The index takes 4 bytes per token, the text itself 2 (4 if the
vocabulary exceeds 65536), and both are mapped into memory. It uses no hashes, and a run may have any length. **It holds
the training text**: anyone who has the engine can read it.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.filters import Followers

TEXT_FILE, SUFFIXES_FILE, BLOCKS_FILE = "tokens.npy", "suffixes.npy", "blocks.npy"
SHORT_RUN = 5
"""The length of a run, in tokens, that an original text seldom shares with others."""


@dataclass(frozen=True, slots=True)
class VerbatimIndex:
    """A text `[tokens]` in the format of `pipeline.tokens`, and the suffix arrays of its blocks `[tokens]`."""

    text: NDArray[np.unsignedinteger]
    """The token ids, most significant byte first, so that bytes compare as the ids do."""
    suffixes: NDArray[np.uint32]
    """Positions in the block, sorted by what begins there."""
    blocks: list[int]
    """The positions where the blocks begin, and the length of the text."""


class VerbatimText:
    """A lookup in an index."""

    def __init__(self, index: VerbatimIndex, end_of_text_id: int) -> None:
        self._type, self._width = index.text.dtype, index.text.dtype.itemsize
        text, suffixes = index.text.view(np.uint8).data, index.suffixes.data
        self._blocks = [
            (text[self._width * start : self._width * stop], suffixes[start:stop])
            for start, stop in pairwise(index.blocks)
        ]
        self._end_of_text_id = end_of_text_id

    def followers(self, run: list[int]) -> Iterator[int]:
        """Yield, in rising order, the tokens that follow a run of at least one token anywhere in a document.

        An end-of-text separates documents: it is neither a follower nor part of a run.
        """
        if self._end_of_text_id in run:
            return
        begun = np.array(run, self._type).tobytes()
        found = (self._followers_in(text, suffixes, begun) for text, suffixes in self._blocks)
        yield from (follower for follower, _ in groupby(heapq.merge(*found)))

    def _followers_in(self, text: memoryview, suffixes: memoryview, begun: bytes) -> Iterator[int]:
        width, longer = self._width, len(begun) + self._width

        def beginning(position: int) -> bytes:
            return bytes(text[position * width : position * width + longer])

        # The suffixes that begin with the run are adjacent, ordered by what follows it.
        count = len(suffixes)
        place = bisect_left(suffixes, begun, key=beginning)
        while place < count:
            continued = beginning(suffixes[place])
            if not continued.startswith(begun):
                break
            follower = int.from_bytes(continued[len(begun) :], "big")
            if follower != self._end_of_text_id:
                yield follower
            # Skip to the next follower in leaps that double: most followers occur once or twice.
            leap = 1
            while place + leap < count and beginning(suffixes[place + leap]) == continued:
                leap *= 2
            place = bisect_right(suffixes, continued, place + leap // 2, min(place + leap, count), key=beginning)


class CopyLimiter:
    """Finds the tokens with which a growing output would copy too much; `filters.verbatim_ids` defines them.

    A copy grows by one token per step. If the last k tokens never occur in the training text followed by anything, no
    copy can include them and continue. The next possible copy of full length is limit + 1 - k tokens away, so lookups
    are skipped until then.
    """

    def __init__(self, limit: int, followers: Followers) -> None:
        self._limit = limit
        self._followers = followers
        self._short = max(limit // 2, SHORT_RUN)
        self._next_length = limit

    def ids(self, output_ids: list[int]) -> list[int]:
        """Return the tokens that must not come next, including ending ids. Call it at each step of the output."""
        length = len(output_ids)
        if length < self._next_length:
            return []
        if self._short < self._limit and not any(True for _ in self._followers(output_ids[-self._short :])):
            self._next_length = length + self._limit + 1 - self._short
            return []
        return list(self._followers(output_ids[-self._limit :]))


def open_index(folder: Path) -> VerbatimIndex:
    """Map the index in `folder` into memory. That of an older export is one block."""
    text, suffixes = (np.load(folder / name, mmap_mode="r") for name in (TEXT_FILE, SUFFIXES_FILE))
    blocks = folder / BLOCKS_FILE
    return VerbatimIndex(text, suffixes, np.load(blocks).tolist() if blocks.exists() else [0, len(text)])
