"""MAUVE: how near two sets of texts are in the hidden states of a model; 1 if they are alike, near 0 at worst.

Pillutla et al. 2021, "MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers".

A text's feature is a hidden state of one model for both sets. The paper takes the state at the text's end; the mean
over all its tokens depends less on the last one. `sort_in_buckets` sorts the features, `mauve_of_buckets` gives the
score. Neither the order of the texts counts nor which set is which.

Compare scores only for the same number of texts and buckets. The paper has thousands of texts. With few texts, in few
buckets, the score does not show what sets them apart and moves with the seed by several hundredths: take the mean over
several seeds.

The authors' package, mauve-text, is under the GPL, which this project is not, and brings a second k-means of 19 MB.
This is the definition of the paper with the settings of the package: the same buckets give the same score.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from pipeline.errors import UserError

TEXTS_PER_BUCKET = 10
"""The number of texts of the smaller set per bucket. The paper has 5000 texts in 500 buckets."""
LEAST_BUCKETS = 2
EXPLAINED_VARIANCE = 0.9
"""The share of the variance in the directions that are kept."""
SCALING_FACTOR = 5.0
"""The constant c of the paper, which spreads the scores between 0 and 1."""
CURVE_POINTS = 25
LEAST_MIXTURE = 1e-6
RESTARTS = 5
MAX_ITERATIONS = 500

Floats = npt.NDArray[np.float64]


class Buckets(NamedTuple):
    """The bucket of each text, int64 [texts] per set, and the number of buckets."""

    own: npt.NDArray[np.int64]
    human: npt.NDArray[np.int64]
    buckets: int


def sort_in_buckets(
    own: npt.NDArray[np.floating], human: npt.NDArray[np.floating], *, seed: int, buckets: int | None = None
) -> Buckets:
    """Sort two sets of texts into buckets by their features, [texts, width] each.

    Features are scaled to length 1 and projected on the principal directions that explain 90 % of their variance;
    k-means, started from `seed`, sorts them into `buckets`, by default one per ten texts of the smaller set. Raises
    `UserError` for features that are empty, of two widths, or not finite.
    """
    for name, features in (("own", own), ("human", human)):
        if features.ndim != 2 or features.size == 0:
            raise UserError(f"mauve: {name} features have the shape {list(features.shape)}, give [texts, width]")
        if not np.isfinite(features).all():
            raise UserError(f"mauve: {name} features hold NaN or infinity; check the model that they come from")
    if own.shape[1] != human.shape[1]:
        raise UserError(
            f"mauve: features are {own.shape[1]} wide for own texts and {human.shape[1]} for human ones; take both "
            "from one model"
        )
    if buckets is None:
        buckets = max(LEAST_BUCKETS, round(min(len(own), len(human)) / TEXTS_PER_BUCKET))
    labels = _find_buckets(np.concatenate([own, human]).astype(np.float64), buckets, seed)
    return Buckets(labels[: len(own)], labels[len(own) :], buckets)


def mauve_of_buckets(texts: Buckets) -> float:
    """Return MAUVE: the `divergence_area` of the shares that each set of texts has in the buckets."""
    own, human = (np.bincount(labels, minlength=texts.buckets) / len(labels) for labels in (texts.own, texts.human))
    return divergence_area(own, human)


def divergence_area(first: Floats, second: Floats, scaling_factor: float = SCALING_FACTOR) -> float:
    """Return the area under the divergence curve of two distributions, `first` P and `second` Q, [buckets] each.

    The curve goes through (exp(-c KL(Q | R)), exp(-c KL(P | R))) for the mixtures R = λ P + (1 - λ) Q, λ from 0 to 1,
    and ends on the axes at (1, 0) and (0, 1); `scaling_factor` is c. It is straight between `CURVE_POINTS`
    mixtures. The area is 1 for equal distributions; for disjoint ones with c = 5 it is 1 / 252, apart from the error of
    the straight pieces.
    """
    points = [(1.0, 0.0)]
    for share in np.linspace(LEAST_MIXTURE, 1 - LEAST_MIXTURE, CURVE_POINTS):
        mixture = share * first + (1 - share) * second
        divergences = (_divergence(second, mixture), _divergence(first, mixture))
        points.append((math.exp(-scaling_factor * divergences[0]), math.exp(-scaling_factor * divergences[1])))
    points.append((0.0, 1.0))
    # With more of P in the mixture, x falls and y grows: the points are in order.
    x, y = np.array(points[::-1]).T
    return float(np.trapezoid(y, x))


def _divergence(part: Floats, mixture: Floats) -> float:
    """Return the Kullback-Leibler divergence of `part` from a mixture that contains it, in nats."""
    held = part > 0
    return float(np.sum(part[held] * np.log(part[held] / mixture[held])))


def _find_buckets(features: Floats, buckets: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the bucket of each text, int64 [texts].

    Equal texts are one point with more weight, so that rounding cannot separate them.
    """
    lengths = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    points, places, counts = np.unique(features / lengths, axis=0, return_inverse=True, return_counts=True)
    points -= np.average(points, axis=0, weights=counts)
    clusters = KMeans(min(buckets, len(points)), n_init=RESTARTS, max_iter=MAX_ITERATIONS, random_state=seed)
    # Threads add up in any order, which could move a text between two buckets to the other one.
    with threadpool_limits(limits=1):
        _, spreads, directions = np.linalg.svd(np.sqrt(counts)[:, None] * points, full_matrices=False)
        explained = np.cumsum(spreads**2)
        kept = 1 + int(np.searchsorted(explained, EXPLAINED_VARIANCE * explained[-1]))
        clusters.fit(points @ directions[:kept].T, sample_weight=counts)
    return np.asarray(clusters.labels_, dtype=np.int64)[places]
