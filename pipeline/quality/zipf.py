"""How steeply the frequency of tokens falls with their rank."""

from collections.abc import Sequence

import numpy as np

from pipeline.quality.ngrams import TokenIds

RANKS = 5000
"""The number of frequent tokens that count, as in the code of Holtzman et al.: rarer ones are a staircase of ties."""


def zipf_coefficient(samples: Sequence[TokenIds], ranks: int = RANKS) -> float:
    """Return the exponent s of frequency ∝ rank^-s, over the tokens of all samples together.

    Minus the slope of the least-squares line through (ln rank, ln count) of the `ranks` most frequent tokens, or of all
    if there are fewer; the first rank is 1, and tokens with equal counts take successive ranks. Zipf 1949; for samples
    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration". About 1 for people, higher if a few
    tokens make up most of the text. It depends on the amount of text, so compare sets of the same size. 0 if there are
    fewer than two different tokens, because no line goes through one point.
    """
    ids = np.concatenate([np.empty(0, dtype=np.int64), *(np.asarray(sample, dtype=np.int64) for sample in samples)])
    counts = -np.sort(-np.unique(ids, return_counts=True)[1])[:ranks]
    if len(counts) < 2:
        return 0.0
    x, y = np.log(np.arange(1, len(counts) + 1)), np.log(counts)
    x -= x.mean()
    # 0 is added because a slope of 0 would give -0.
    return float(-(x @ (y - y.mean())) / (x @ x)) + 0.0
