"""An index of the training text in an engine, to look up quickly which tokens follow a run of tokens in it.

The index is a suffix array (Manber and Myers 1993): the positions of the text, sorted by the text that begins at each.
So all occurrences of a run are adjacent, and bisection finds them. It takes 4 bytes per token, the text itself 2 (4 if
the vocabulary exceeds 65536), and both are mapped into memory. It uses no hashes, and a run may have any length. **It
holds the training text**: anyone who has the engine can read it.
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
"""The length of a run, in tokens, that an original text seldom shares with others."""


@dataclass(frozen=True, slots=True)
class VerbatimIndex:
    """A text `[tokens]` in the format of `pipeline.tokens`, and its suffix array `[tokens]`."""

    text: NDArray[np.unsignedinteger]
    """The token ids, most significant byte first, so that bytes compare as the ids do."""
    suffixes: NDArray[np.uint32]

    def save(self, folder: Path) -> None:
        """Write the index to `folder`, which must not exist. The same text gives the same bytes."""
        folder.mkdir()
        np.save(folder / TEXT_FILE, self.text)
        np.save(folder / SUFFIXES_FILE, self.suffixes)


class VerbatimText:
    """A lookup in an index."""

    def __init__(self, index: VerbatimIndex, end_of_text_id: int) -> None:
        self._type, self._width = index.text.dtype, index.text.dtype.itemsize
        self._bytes = index.text.view(np.uint8).data
        self._suffixes = index.suffixes.data
        self._end_of_text_id = end_of_text_id

    def followers(self, run: list[int]) -> Iterator[int]:
        """Yield, in rising order, the tokens that follow a run of at least one token anywhere in a document.

        An end-of-text separates documents: it is neither a follower nor part of a run.
        """
        if self._end_of_text_id in run:
            return
        begun = np.array(run, self._type).tobytes()
        width, longer = self._width, len(begun) + self._width

        def beginning(position: int) -> bytes:
            return bytes(self._bytes[position * width : position * width + longer])

        suffixes, count = self._suffixes, len(self._suffixes)
        # The suffixes that begin with the run are adjacent, ordered by what follows it.
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


def index_text(tokens: Tokens) -> VerbatimIndex:
    """Index a training text in which an end-of-text follows each document.

    Takes about 50 bytes of memory per token, and 12 s for ten million. Raises `UserError` if the text is too long.
    """
    if len(tokens) >= MOST_TOKENS:
        raise UserError(
            f"export.verbatim_index: {len(tokens)} training tokens are more than the {MOST_TOKENS - 1} that an index "
            "holds; set it to false"
        )
    return VerbatimIndex(tokens.astype(tokens.dtype.newbyteorder(">")), sort_suffixes(tokens))


def sort_suffixes(tokens: Tokens) -> NDArray[np.uint32]:
    """Return the positions of a non-empty text, sorted by the text that begins at each; a prefix sorts first.

    By doubling: pairs of ranks by the first k tokens give ranks by the first 2 k.
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
    """Map the index in `folder` into memory."""
    text, suffixes = (np.load(folder / name, mmap_mode="r") for name in (TEXT_FILE, SUFFIXES_FILE))
    return VerbatimIndex(text, suffixes)
