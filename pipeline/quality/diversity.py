"""How much samples differ, from each other and within themselves."""

from collections.abc import Sequence

import numpy as np

from pipeline.quality.ngrams import TokenIds, ngrams, unique_share


def distinct_n(samples: Sequence[TokenIds], n: int) -> float:
    """Different n-grams as a share of all n-grams, both counted over all samples together.

    Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", who divide by the number
    of tokens; dividing by that of n-grams, as is usual, lets the measure reach 1. It falls as samples grow longer or
    more, so compare like with like. 0 where there is no n-gram.
    """
    rows = [ngrams(sample, n) for sample in samples]
    return unique_share(np.concatenate(rows)) if sum(map(len, rows)) else 0.0
