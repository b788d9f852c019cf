"""How varied samples are, within themselves and among each other."""

from collections.abc import Sequence

import numpy as np

from pipeline.quality.ngrams import TokenIds, ngrams, unique_share


def distinct_n(samples: Sequence[TokenIds], n: int) -> float:
    """Return the share of different n-grams among all n-grams, both counted over all samples together.

    Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", who divide by the number
    of tokens; dividing by that of n-grams, as is usual, lets the figure reach 1. It falls with longer and with more
    samples, so compare sets of the same size. 0 if there is no n-gram.
    """
    rows = [ngrams(sample, n) for sample in samples]
    return unique_share(np.concatenate(rows)) if sum(map(len, rows)) else 0.0
