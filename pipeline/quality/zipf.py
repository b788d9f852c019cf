"""How steeply the frequency of tokens falls with their rank."""

from collections.abc import Sequence

import numpy as np

from pipeline.quality.ngrams import TokenIds

RANKS = 5000
"""As many of the most frequent tokens count, as in the code of Holtzman et al.: rarer ones are a staircase of ties."""


def zipf_coefficient(samples: Sequence[TokenIds], ranks: int = RANKS) -> float:
    """The exponent s of frequency ∝ rank^-s, over the tokens of all samples together.

    Minus the slope of the least-squares line through (ln rank, ln count) of the `ranks` most frequent tokens, or of all
    where there are fewer; the first rank is 1, and tokens of one count take ranks one after the other. Zipf 1949; as a
    measure of samples Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration". About 1 for people, higher
    where a few tokens do the most. It depends on how much text there is, so compare like with like. 0 where there are
    fewer than two different tokens, through which no line goes.
    """
    ids = np.concatenate([np.empty(0, dtype=np.int64), *(np.asarray(sample, dtype=np.int64) for sample in samples)])
    counts = -np.sort(-np.unique(ids, return_counts=True)[1])[:ranks]
    if len(counts) < 2:
        return 0.0
    x, y = np.log(np.arange(1, len(counts) + 1)), np.log(counts)
    x -= x.mean()
    # 0 is added since what has no slope would be -0.
    return float(-(x @ (y - y.mean())) / (x @ x)) + 0.0
