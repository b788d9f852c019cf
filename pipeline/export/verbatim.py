"""Write the index of a training text that `pipeline.engine.verbatim` describes and reads."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.verbatim import BLOCKS_FILE, SUFFIXES_FILE, TEXT_FILE
from pipeline.progress import progress
from pipeline.tokens import Tokens, write_header

BLOCK_TOKENS = 1 << 24
"""The size from which a block ends where a document does; sorting takes 50 bytes of memory per token of a block."""


def write_index(folder: Path, tokens: Tokens, bounds: NDArray[np.int64]) -> None:
    """Write the index of a text to `folder`, which must not exist. The same text gives the same bytes.

    `tokens` and `bounds` are those of `TokenArrays`. Takes 12 s per ten million tokens, and at most 0.9 GB of memory
    unless a document is longer than a block.
    """
    folder.mkdir()
    blocks = find_blocks(bounds)
    with (
        (folder / TEXT_FILE).open("wb") as text_file,
        (folder / SUFFIXES_FILE).open("wb") as suffixes_file,
        progress(description="index", total=len(tokens), unit="token", unit_scale=True) as bar,
    ):
        byte_order = tokens.dtype.newbyteorder(">")
        write_header(text_file, byte_order, len(tokens))
        write_header(suffixes_file, "<u4", len(tokens))
        for start, stop in pairwise(blocks):
            block = tokens[start:stop]
            text_file.write(block.astype(byte_order).data)
            suffixes_file.write(sort_suffixes(block).data)
            bar.update(stop - start)
    np.save(folder / BLOCKS_FILE, np.array(blocks, "<i8"))


def find_blocks(bounds: NDArray[np.int64]) -> list[int]:
    """Return where blocks begin, and the length of the text. `bounds` are the positions where its documents end."""
    blocks, last = [0], len(bounds) - 1
    while blocks[-1] <= bounds[last]:
        end = min(int(np.searchsorted(bounds, blocks[-1] + BLOCK_TOKENS - 1)), last)
        blocks.append(int(bounds[end]) + 1)
    return blocks


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
