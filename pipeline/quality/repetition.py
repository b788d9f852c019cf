"""How much a text repeats itself."""

import numpy as np
import numpy.typing as npt

from pipeline.quality.ngrams import TokenIds, ngrams, unique_share


def rep_n(token_ids: TokenIds, n: int) -> float:
    """Return the share of a text's n-grams that occur earlier in it: 1 - unique / total.

    seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training". 0 if there is no n-gram.
    """
    return 1 - unique_share(ngrams(token_ids, n))


def mark_repeats(token_ids: TokenIds, n: int) -> npt.NDArray[np.bool_]:
    """Mark the tokens of n-grams that occur earlier in the text, as `rep_n` counts them; bool [tokens]."""
    rows = ngrams(token_ids, n)
    first = np.unique(rows, axis=0, return_index=True)[1]
    again = np.setdiff1d(np.arange(len(rows)), first)
    repeated = np.zeros(len(token_ids), dtype=bool)
    for offset in range(n):
        repeated[again + offset] = True
    return repeated


def is_looping(token_ids: TokenIds, max_ngram_tokens: int, repeats: int, min_ngram_tokens: int = 1) -> bool:
    """Check whether a text ends in one n-gram, `min_ngram_tokens` to `max_ngram_tokens` long, `repeats` times in a row.

    A loop that is cut off in the middle of the n-gram counts: its end repeats the n-gram that begins at another token.
    The definition is ours; Holtzman et al. 2020 describe such loops in "The Curious Case of Neural Text Degeneration".
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    for n in range(min_ngram_tokens, min(max_ngram_tokens, len(ids) // repeats) + 1):
        end = ids[len(ids) - n * repeats :]
        if (end[n:] == end[:-n]).all():
            return True
    return False
