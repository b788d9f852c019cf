"""How much samples resemble each other: the BLEU of each against all others.

BLEU: Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation". Self-BLEU: Zhu et al.
2018, "Texygen: A Benchmarking Platform for Text Generation Models".

The n-grams of all samples are counted once. The count of an n-gram among the others is its highest count in any sample,
or the second highest for the sample with the highest. So the work grows with the n-grams, not with pairs of samples.
"""

from collections.abc import Collection, Hashable, Sequence

import numpy as np
import numpy.typing as npt

EPSILON = 0.1
"""The count for no match: method 1 of Chen and Cherry 2014, "A Systematic Comparison of Smoothing Techniques for
Sentence-Level BLEU", with the value of NLTK and so of Texygen."""

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def self_bleu(samples: Sequence[Collection[Hashable]], n: int) -> float:
    """Return the mean of `bleu_against_others` over the samples; 0 if there are fewer than two.

    High if samples are alike, as those of a collapsed model. It rises with more and with longer samples, so compare
    sets of the same size.
    """
    return float(bleu_against_others(samples, n).mean()) if len(samples) > 1 else 0.0


def bleu_against_others(samples: Sequence[Collection[Hashable]], n: int) -> Floats:
    """Return the BLEU of each sample with all others as its references, float64 [samples]; tokens are ids or words.

    min(1, exp(1 - r / c)) · (p_1 · … · p_n)^(1/n), where c is the length of the sample and r that of the other sample
    nearest in length, the shorter of two equally near. p_k is the share of the sample's k-grams that occur in the
    others, each counted at most as often as in the other sample that has it most often; no match at all counts as
    `EPSILON` matches, and no k-gram as one. 0 for a sample without a token in common with any other.
    """
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    log_precisions = np.zeros(len(samples))
    shares_token = np.zeros(len(samples), dtype=bool)
    for order, (matches, totals) in enumerate(_count_matches(samples, lengths, n)):
        if order == 0:
            shares_token = matches > 0
        log_precisions += np.log(np.where(matches > 0, matches, EPSILON) / np.maximum(1, totals))
    nearest = _find_nearest_lengths(lengths)
    # A sample without a token shares none, so its length may be replaced by any number.
    log_brevity = np.minimum(0, 1 - nearest / np.maximum(1, lengths))
    return np.where(shares_token, np.exp(log_brevity + log_precisions / n), 0.0)


def _count_matches(samples: Sequence[Collection[Hashable]], lengths: Int64s, n: int) -> list[tuple[Floats, Int64s]]:
    """Return for each order up to `n` the matched n-grams of each sample and all its n-grams; [samples] each."""
    vocabulary: dict[Hashable, int] = {}
    tokens = np.array(
        [vocabulary.setdefault(token, len(vocabulary)) for sample in samples for token in sample], dtype=np.int64
    )
    owners = np.repeat(np.arange(len(samples)), lengths)
    ends = np.repeat(np.cumsum(lengths), lengths)
    starts, names = np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
    found = []
    for order in range(1, n + 1):
        is_whole = starts + order <= ends[starts]
        starts = starts[is_whole]
        # An n-gram is identified by the name of all but its last token, and that token: names stay small.
        keys = names[is_whole] * len(vocabulary) + tokens[starts + order - 1]
        names = np.unique(keys, return_inverse=True)[1]
        totals = np.bincount(owners[starts], minlength=len(samples))
        found.append((_clip_matches(names, owners[starts], len(samples)), totals))
    return found


def _clip_matches(names: Int64s, owners: Int64s, samples: int) -> Floats:
    """Count the n-grams of each sample that the others have, each at most as often as the one that has it most."""
    pairs, counts = np.unique(names * samples + owners, return_counts=True)
    pair_names, pair_owners = np.divmod(pairs, samples)
    descending = np.lexsort((-counts, pair_names))
    pair_names, pair_owners, counts = pair_names[descending], pair_owners[descending], counts[descending]
    is_first = np.diff(pair_names, prepend=-1) != 0
    highest = counts[is_first][np.cumsum(is_first) - 1]
    # The first sample of an n-gram is followed by its second, or by the first of the next n-gram.
    second = np.where(np.append(is_first[1:], True), 0, np.append(counts[1:], 0))
    others = np.where(is_first, second, highest)
    return np.bincount(pair_owners, weights=np.minimum(counts, others), minlength=samples).astype(np.float64)


def _find_nearest_lengths(lengths: Int64s) -> Int64s:
    """Return for each length the nearest of the others, the shorter of two equally near; itself if there is no other.

    In order of length, the nearest is a neighbour.
    """
    if len(lengths) < 2:
        return lengths
    order = np.argsort(lengths)
    ordered = lengths[order]
    shorter, longer = np.roll(ordered, 1), np.roll(ordered, -1)
    takes_shorter = ordered - shorter <= longer - ordered
    takes_shorter[0], takes_shorter[-1] = False, True
    nearest = np.empty_like(lengths)
    nearest[order] = np.where(takes_shorter, shorter, longer)
    return nearest
