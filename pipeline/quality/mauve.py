"""How near two sets of texts lie to each other in a model's eyes.

Pillutla et al. 2021, "MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers".

The authors' package, mauve-text, is under the GPL, which this project is not, and brings a second k-means of 19 MB.
This is the definition of the paper with the settings of the package; where the buckets come out the same, so does the
score.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from pipeline.errors import UserError

TEXTS_A_BUCKET = 10
"""Texts of the smaller set for each bucket. The paper has 5000 texts in 500 buckets."""
LEAST_BUCKETS = 2
EXPLAINED_VARIANCE = 0.9
"""Share of the variance in the directions that are kept."""
SCALING_FACTOR = 5.0
"""c of the paper: spreads the scores between 0 and 1."""
CURVE_POINTS = 25
LEAST_MIXTURE = 1e-6
RESTARTS = 5
MAX_ITERATIONS = 500

Floats = npt.NDArray[np.float64]


class Bucketed(NamedTuple):
    """In which of `buckets` buckets each text lies, int64 [texts] each."""

    own: npt.NDArray[np.int64]
    human: npt.NDArray[np.int64]
    buckets: int


def mauve(
    own: npt.NDArray[np.floating], human: npt.NDArray[np.floating], *, seed: int, buckets: int | None = None
) -> float:
    """MAUVE of two sets of texts by their features, [texts, width] each: 1 where they are alike, near 0 at worst.

    A text's feature is a hidden state of one model for both sets: in the paper that at its end, or the mean of all,
    which says less of the last token. The score is that of the buckets in which `sort_in_buckets` puts them. Neither
    the order of the texts counts nor which set is which.

    Scores compare for as many texts and buckets only. The paper has thousands of texts: few of them, in few buckets, do
    not show what sets them apart, and give a score that moves with the seed by several hundredths, so take the mean
    over some. Raises `UserError` for features that are none, of two widths, or not finite.
    """
    return mauve_of_buckets(sort_in_buckets(own, human, seed=seed, buckets=buckets))


def sort_in_buckets(
    own: npt.NDArray[np.floating], human: npt.NDArray[np.floating], *, seed: int, buckets: int | None = None
) -> Bucketed:
    """Sort two sets of texts by their features, [texts, width] each, as `mauve` does.

    Features are brought to length 1 and turned to the principal directions that explain 90 % of their variance;
    k-means, begun by `seed`, sorts them in `buckets`, by default one for ten texts of the smaller set. Raises
    `UserError` as `mauve` does.
    """
    for name, features in (("own", own), ("human", human)):
        if features.ndim != 2 or features.size == 0:
            raise UserError(f"mauve: {name} features have the shape {list(features.shape)}, give [texts, width]")
        if not np.isfinite(features).all():
            raise UserError(f"mauve: {name} features hold NaN or infinity; look at the model that they are of")
    if own.shape[1] != human.shape[1]:
        raise UserError(
            f"mauve: features are {own.shape[1]} wide for own texts and {human.shape[1]} for human ones; take both of "
            "one model"
        )
    if buckets is None:
        buckets = max(LEAST_BUCKETS, round(min(len(own), len(human)) / TEXTS_A_BUCKET))
    labels = _bucket_of_each(np.concatenate([own, human]).astype(np.float64), buckets, seed)
    return Bucketed(labels[: len(own)], labels[len(own) :], buckets)


def mauve_of_buckets(texts: Bucketed) -> float:
    """The `divergence_area` of the shares that both sets of texts have in the buckets."""
    own, human = (np.bincount(labels, minlength=texts.buckets) / len(labels) for labels in (texts.own, texts.human))
    return divergence_area(own, human)


def divergence_area(first: Floats, second: Floats, scaling_factor: float = SCALING_FACTOR) -> float:
    """Area under the divergence curve of two distributions, `first` P and `second` Q, [buckets] each.

    The curve goes through (exp(-c KL(Q | R)), exp(-c KL(P | R))) for the mixtures R = λ P + (1 - λ) Q, λ from 0 to 1,
    and ends on the axes at (1, 0) and (0, 1); `scaling_factor` is c. Between `CURVE_POINTS` mixtures it is straight.
    1 for equal distributions; for distinct ones, and c = 5, 1 / 252 but for the straight pieces.
    """
    points = [(1.0, 0.0)]
    for share in np.linspace(LEAST_MIXTURE, 1 - LEAST_MIXTURE, CURVE_POINTS):
        mixture = share * first + (1 - share) * second
        divergences = (_divergence(second, mixture), _divergence(first, mixture))
        points.append((math.exp(-scaling_factor * divergences[0]), math.exp(-scaling_factor * divergences[1])))
    points.append((0.0, 1.0))
    # With more of P in the mixture, x falls and y grows: the points come in order.
    x, y = np.array(points[::-1]).T
    return float(np.trapezoid(y, x))


def _divergence(part: Floats, mixture: Floats) -> float:
    """Kullback-Leibler divergence of `part` from a mixture of which it is part, in nats."""
    held = part > 0
    return float(np.sum(part[held] * np.log(part[held] / mixture[held])))


def _bucket_of_each(features: Floats, buckets: int, seed: int) -> npt.NDArray[np.int64]:
    """The bucket of each text, int64 [texts].

    Equal texts are one point of more weight, so that no rounding parts them.
    """
    lengths = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    points, places, counts = np.unique(features / lengths, axis=0, return_inverse=True, return_counts=True)
    points -= np.average(points, axis=0, weights=counts)
    clusters = KMeans(min(buckets, len(points)), n_init=RESTARTS, max_iter=MAX_ITERATIONS, random_state=seed)
    # Threads add up in any order, and a text between two buckets could fall to the other.
    with threadpool_limits(limits=1):
        _, spreads, directions = np.linalg.svd(np.sqrt(counts)[:, None] * points, full_matrices=False)
        explained = np.cumsum(spreads**2)
        kept = 1 + int(np.searchsorted(explained, EXPLAINED_VARIANCE * explained[-1]))
        clusters.fit(points @ directions[:kept].T, sample_weight=counts)
    return np.asarray(clusters.labels_, dtype=np.int64)[places]
