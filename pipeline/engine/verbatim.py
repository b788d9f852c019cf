"""The training text beside an engine, indexed so that what follows a run of its tokens is found in no time.

The index is a suffix array (Manber and Myers 1993): the positions of the text in the order of what stands from each
on, so that all places of a run lie side by side and bisection finds them. It takes 4 bytes a token, the text itself 2
(4 where the vocabulary exceeds 65536), and both are mapped into memory. Nothing rests on hashes, and any length of run
may be asked for. **It holds the training text**: whoever has the engine can read it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.filters import Followers
from pipeline.errors import UserError
from pipeline.tokens import Tokens

TEXT_FILE, SUFFIXES_FILE = "tokens.npy", "suffixes.npy"
MOST_TOKENS = 2**31
SHORT_RUN = 5
"""Tokens in a row that a text of one's own seldom shares with others."""


@dataclass(frozen=True, slots=True)
class VerbatimIndex:
    """A text `[tokens]` as `pipeline.tokens` has it, and its suffix array `[tokens]`."""

    text: NDArray[np.unsignedinteger]
    """Most significant byte first, so that bytes compare as the tokens do."""
    suffixes: NDArray[np.uint32]

    def save(self, folder: Path) -> None:
        """Write the index to `folder`, which is made. The same text gives the same bytes."""
        folder.mkdir()
        np.save(folder / TEXT_FILE, self.text)
        np.save(folder / SUFFIXES_FILE, self.suffixes)


class VerbatimText:
    """The lookup in an index."""

    def __init__(self, index: VerbatimIndex, end_of_text_id: int) -> None:
        self._type, self._width = index.text.dtype, index.text.dtype.itemsize
        self._bytes = index.text.view(np.uint8).data
        self._suffixes = index.suffixes.data
        self._end_of_text_id = end_of_text_id

    def followers(self, run: list[int]) -> Iterator[int]:
        """The tokens that follow a run, of at least one token, wherever it stands in a document; rising.

        An end-of-text parts documents: it is neither a follower nor in any run.
        """
        if self._end_of_text_id in run:
            return
        begun = np.array(run, self._type).tobytes()
        width, longer = self._width, len(begun) + self._width

        def beginning(position: int) -> bytes:
            return bytes(self._bytes[position * width : position * width + longer])

        suffixes, count = self._suffixes, len(self._suffixes)
        # What begins with the run lies side by side, ordered by what follows.
        place = bisect_left(suffixes, begun, key=beginning)
        while place < count:
            continued = beginning(suffixes[place])
            if not continued.startswith(begun):
                break
            follower = int.from_bytes(continued[len(begun) :], "big")
            if follower != self._end_of_text_id:
                yield follower
            # On to the next follower, in leaps that double: most stand there once or twice.
            leap = 1
            while place + leap < count and beginning(suffixes[place + leap]) == continued:
                leap *= 2
            place = bisect_right(suffixes, continued, place + leap // 2, min(place + leap, count), key=beginning)


class CopyLimiter:
    """The tokens with which an output would copy too much, told as it grows: `filters.verbatim_ids` defines them.

    A copy grows by a token a step. Where nothing follows the last k tokens, what holds these and one more is no copy:
    it takes limit + 1 - k tokens until the output can end in one of that length, and so long nothing is looked up.
    """

    def __init__(self, limit: int, followers: Followers) -> None:
        self._limit = limit
        self._followers = followers
        self._short = max(limit // 2, SHORT_RUN)
        self._next_length = limit

    def ids(self, output_ids: list[int]) -> list[int]:
        """The tokens that may not come next, endings of a continuation among them. To be asked as the output grows."""
        length = len(output_ids)
        if length < self._next_length:
            return []
        if self._short < self._limit and not any(True for _ in self._followers(output_ids[-self._short :])):
            self._next_length = length + self._limit + 1 - self._short
            return []
        return list(self._followers(output_ids[-self._limit :]))


def index_text(tokens: Tokens) -> VerbatimIndex:
    """Index a training text, whose documents are each followed by an end-of-text.

    Takes about 50 bytes of memory a token, and 12 s for ten million. Raises `UserError` for a text that is too long.
    """
    if len(tokens) >= MOST_TOKENS:
        raise UserError(
            f"export.verbatim_index: {len(tokens)} training tokens are more than the {MOST_TOKENS - 1} that an index "
            "holds; set it to false"
        )
    return VerbatimIndex(tokens.astype(tokens.dtype.newbyteorder(">")), sort_suffixes(tokens))


def sort_suffixes(tokens: Tokens) -> NDArray[np.uint32]:
    """The positions of a text, not empty, in the order of what stands from each on; a text that has ended comes first.

    By doubling: ranks by the first k tokens, taken in pairs, are ranks by the first 2 k.
    """
    ranks = tokens.astype(np.int64)
    length = 1
    while True:
        keys = ranks << 32
        keys[:-length] |= ranks[length:] + 1
        order = np.argsort(keys)
        keys = keys[order]
        ranks[order] = np.append(0, np.cumsum(keys[1:] != keys[:-1]))
        if ranks[order[-1]] == len(ranks) - 1:
            return order.astype(np.uint32)
        length *= 2


def open_index(folder: Path) -> VerbatimIndex:
    """Map the index that stands in `folder`."""
    text, suffixes = (np.load(folder / name, mmap_mode="r") for name in (TEXT_FILE, SUFFIXES_FILE))
    return VerbatimIndex(text, suffixes)
