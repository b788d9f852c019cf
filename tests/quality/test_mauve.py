"""MAUVE of two sets of features, compared with the scores of mauve-text 0.4.0 with faiss-cpu 1.15.1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from pipeline.errors import UserError
from pipeline.quality.mauve import divergence_area, mauve_of_buckets, sort_in_buckets

same_examples = settings(derandomize=True, deadline=None)

Floats = NDArray[np.float64]
APART = 0.0040720962619612555
"""MAUVE of sets with nothing in common, by mauve-text: 1 / 252, apart from the straight pieces of the curve."""


def mauve(own: NDArray[np.floating], human: NDArray[np.floating], *, seed: int, buckets: int | None = None) -> float:
    return mauve_of_buckets(sort_in_buckets(own, human, seed=seed, buckets=buckets))


def clouds(counts: list[int], seed: int) -> Floats:
    """Draw `counts[i]` texts around direction i, with all directions far apart."""
    rng = np.random.default_rng(seed)
    centers = np.repeat(10 * np.eye(len(counts), 12), counts, axis=0)
    return centers + rng.normal(0, 0.05, centers.shape)


def cloud(texts: int, shift: float, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(0, 1, (texts, 16)) + shift * np.eye(16)[0]


@same_examples
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_area_of_equal_distributions_is_1(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    assert divergence_area(shares, shares) == pytest.approx(1)


def test_area_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    half, one, other = np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.array([0.0, 1.0])
    monkeypatch.setattr("pipeline.quality.mauve.CURVE_POINTS", 10_000)
    # x = (1 - λ)^c, y = λ^c: the area is the beta function c · B(c, c + 1).
    assert divergence_area(one, other) == pytest.approx(1 / 252, rel=1e-4)
    assert divergence_area(one, other, scaling_factor=1) == pytest.approx(1 / 2, rel=1e-4)
    # With r = 1 - λ / 2: x = r², y = 4 r (1 - r).
    assert divergence_area(half, one, scaling_factor=2) == pytest.approx(17 / 24, rel=1e-4)


@same_examples
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_area_is_symmetric_and_between_0_and_1(counts: list[tuple[int, int]]) -> None:
    first, second = (np.array(own, dtype=float) for own in zip(*counts, strict=True))
    if first.sum() == 0 or second.sum() == 0:
        return
    first, second = first / first.sum(), second / second.sum()
    area = divergence_area(first, second)
    assert 0 < area <= 1 + 1e-9
    assert divergence_area(second, first) == pytest.approx(area)


@pytest.mark.parametrize(
    ("own", "human", "expected"),
    [
        ([10, 20, 10, 0], [5, 5, 5, 25], 0.14293144717699502),
        ([50, 30, 20], [20, 30, 50], 0.8214099836116461),
        ([30, 1, 1], [1, 1, 30], 0.018374263262710338),
        ([7, 13, 20, 10], [9, 11, 20, 10], 0.9997130387025466),
        ([40, 0], [0, 40], APART),
    ],
)
def test_score_is_mauve_texts_where_buckets_are_plain(own: list[int], human: list[int], expected: float) -> None:
    found = mauve(clouds(own, seed=1), clouds(human, seed=2), seed=1, buckets=len(own))
    assert found == pytest.approx(expected, rel=1e-12)
    area = divergence_area(np.array(own) / sum(own), np.array(human) / sum(human))
    assert area == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("shift", "lowest", "highest"),
    [(0, 0.9661, 0.9781), (1, 0.6764, 0.8397), (2, 0.2878, 0.3649), (4, 0.0197, 0.0334)],
)
def test_score_is_about_mauve_texts_where_buckets_are_not(shift: float, lowest: float, highest: float) -> None:
    # The bounds are those of its scores for four seeds: one cloud of 400 texts can be cut into buckets in many ways.
    scores = [mauve(cloud(400, shift, seed=2), cloud(400, 0, seed=1), seed=seed) for seed in range(1, 5)]
    assert 0.9 * lowest < float(np.mean(scores)) < 1.1 * highest


def test_equal_texts_lie_in_one_bucket() -> None:
    features = cloud(60, 0, seed=1)
    assert mauve(features, features[::-1], seed=1) == pytest.approx(1)
    assert mauve(features, np.repeat(features, 3, axis=0), seed=1) == pytest.approx(1)


def test_neither_order_nor_side_counts() -> None:
    own, human = cloud(80, 0, seed=1), cloud(70, 1, seed=2)
    score = mauve(own, human, seed=3)
    assert mauve(own[::-1], human, seed=3) == score
    assert mauve(human, own, seed=3) == pytest.approx(score)


def test_same_seed_same_score() -> None:
    own, human = cloud(100, 0, seed=1), cloud(100, 0.5, seed=2)
    assert mauve(own, human, seed=3) == mauve(own, human, seed=3)


def test_the_farther_the_lower() -> None:
    human = cloud(400, 0, seed=1)
    scores = [mauve(cloud(400, shift, seed=2), human, seed=3) for shift in (0, 1, 2, 8)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.9
    assert scores[-1] < 0.01


def test_length_of_a_feature_does_not_count() -> None:
    own, human = cloud(50, 3, seed=1), cloud(50, 3, seed=2)
    assert mauve(7 * own, human, seed=3) == pytest.approx(mauve(own, human, seed=3))


def test_float32_are_features_too() -> None:
    own, human = cloud(50, 1, seed=1).round(1), cloud(50, 0, seed=2).round(1)
    halves = mauve(own.astype(np.float32), human.astype(np.float32), seed=3)
    assert halves == pytest.approx(mauve(own, human, seed=3))


@pytest.mark.filterwarnings(f"error::{ConvergenceWarning.__module__}.{ConvergenceWarning.__name__}")
@pytest.mark.parametrize(
    ("own", "human", "expected"),
    [
        ([[1, 2]] * 5, [[1, 2]] * 30, 1),  # all the same
        ([[1, 2]], [[1, 2]], 1),
        ([[0, 0]] * 3, [[0, 0]], 1),
        ([[1, 0]] * 40, [[0, 1]] * 40, APART),  # fewer texts than buckets
        ([[1, 0]], [[0, 1]], APART),  # one text each
        ([[0, 0]], [[0, 1]], APART),
    ],
)
def test_few_texts_by_hand(own: list[list[float]], human: list[list[float]], expected: float) -> None:
    assert mauve(np.array(own, dtype=float), np.array(human, dtype=float), seed=1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("own", "human", "message"),
    [
        (np.empty((0, 4)), np.ones((2, 4)), r"own features have the shape \[0, 4\], give \[texts, width\]"),
        (np.ones((2, 4)), np.ones(4), r"human features have the shape \[4\], give \[texts, width\]"),
        (np.ones((2, 4)), np.ones((2, 5)), "features are 4 wide for own texts and 5 for human ones"),
        (np.full((2, 4), np.nan), np.ones((2, 4)), "own features hold NaN or infinity"),
        (np.ones((2, 4)), np.full((2, 4), np.inf), "human features hold NaN or infinity"),
    ],
)
def test_what_is_no_features_is_an_error(own: Floats, human: Floats, message: str) -> None:
    with pytest.raises(UserError, match=f"^mauve: {message}"):
        mauve(own, human, seed=1)
