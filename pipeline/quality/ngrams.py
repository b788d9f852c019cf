"""The n-grams of token sequences, as rows of an array."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TokenIds = Sequence[int] | npt.NDArray[np.integer]


def ngrams(token_ids: TokenIds, n: int) -> npt.NDArray[np.int64]:
    """Return every run of `n` tokens in order, int64 [ngrams, n]; no rows if there are fewer than `n` tokens."""
    ids = np.asarray(token_ids, dtype=np.int64)
    if len(ids) < n:
        return np.empty((0, n), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(ids, n)


def unique_share(rows: npt.NDArray[np.int64]) -> float:
    """Return the share of different n-grams among all; 1 if there are no n-grams."""
    return len(np.unique(rows, axis=0)) / len(rows) if len(rows) else 1.0
