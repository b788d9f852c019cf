"""How much a text repeats itself."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.quality.ngrams import TokenIds, ngrams, unique_share


def rep_n(token_ids: TokenIds, n: int) -> float:
    """Share of a continuation's n-grams that stand in it already: 1 - unique / total.

    seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training". 0 where there is no n-gram.
    """
    return 1 - unique_share(ngrams(token_ids, n))


def repeated_tokens(token_ids: TokenIds, n: int) -> npt.NDArray[np.bool_]:
    """Which tokens lie in an n-gram that stands in the sample before, as `rep_n` counts it; bool [tokens]."""
    rows = ngrams(token_ids, n)
    first = np.unique(rows, axis=0, return_index=True)[1]
    again = np.setdiff1d(np.arange(len(rows)), first)
    repeated = np.zeros(len(token_ids), dtype=bool)
    for offset in range(n):
        repeated[again + offset] = True
    return repeated


def mean_rep_n(samples: Sequence[TokenIds], n: int) -> float:
    """`rep_n` of each sample, averaged over the samples as the paper does it. 0 where there is no sample."""
    return float(np.mean([rep_n(sample, n) for sample in samples])) if samples else 0.0


def is_looping(token_ids: TokenIds, max_ngram_tokens: int, repeats: int, min_ngram_tokens: int = 1) -> bool:
    """Whether the end is one n-gram of `min_ngram_tokens` to `max_ngram_tokens` tokens, `repeats` times in a row.

    A loop that is cut off in the middle of the n-gram counts: its end repeats the n-gram from another token on. The
    definition is ours; Holtzman et al. 2020 describe such loops in "The Curious Case of Neural Text Degeneration".
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    for n in range(min_ngram_tokens, min(max_ngram_tokens, len(ids) // repeats) + 1):
        end = ids[len(ids) - n * repeats :]
        if (end[n:] == end[:-n]).all():
            return True
    return False


def share_looping(samples: Sequence[TokenIds], max_ngram_tokens: int, repeats: int) -> float:
    """Share of the samples that end in a loop. 0 where there is no sample."""
    return float(np.mean([is_looping(sample, max_ngram_tokens, repeats) for sample in samples])) if samples else 0.0
