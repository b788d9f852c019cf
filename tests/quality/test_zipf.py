"""The Zipf coefficient of samples."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress

from pipeline.quality.zipf import RANKS, zipf_coefficient

same_examples = settings(derandomize=True, deadline=None)


def sample_of(counts: list[int]) -> list[int]:
    """Return a text in which token i occurs `counts[i]` times."""
    return np.repeat(np.arange(len(counts)), counts).tolist()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([12, 6, 4, 3], 1),
        ([3, 12, 4, 6], 1),  # which token is the frequent one does not count
        ([144, 36, 16, 9], 2),
        ([5, 5, 5], 0),
        ([8, 1], 3),
        # x = (0, ln 2, ln 3), y = (2 ln 2, 0, 0)
        ([4, 1, 1], 2 * math.log(2) * (math.log(6) / 3) / (math.log(2) ** 2 + math.log(3) ** 2 - math.log(6) ** 2 / 3)),
    ],
)
def test_coefficient_by_hand(counts: list[int], expected: float) -> None:
    assert zipf_coefficient([sample_of(counts)]) == pytest.approx(expected)


def test_tokens_of_all_samples_are_counted_together() -> None:
    assert zipf_coefficient([[1, 1, 2], [], [2, 1, 1]]) == zipf_coefficient([[1, 1, 1, 1, 2, 2]]) == pytest.approx(1)


@same_examples
@given(st.lists(st.lists(st.integers(0, 20)), max_size=5), st.integers(2, 25))
def test_coefficient_against_linregress(samples: list[list[int]], ranks: int) -> None:
    counts = [count for _, count in Counter(chain(*samples)).most_common(ranks)]
    expected = -linregress(np.log(np.arange(1, len(counts) + 1)), np.log(counts)).slope if len(counts) > 1 else 0
    assert zipf_coefficient(samples, ranks) == pytest.approx(expected, abs=1e-12)


def test_only_the_most_frequent_tokens_count() -> None:
    power_law = [2 * (RANKS // rank) for rank in range(1, RANKS + 1)]
    once = [1] * 1000
    assert zipf_coefficient([sample_of(power_law + once)]) == zipf_coefficient([sample_of(power_law)])
    assert zipf_coefficient([sample_of([12, 6, 1, 1])], ranks=2) == pytest.approx(1)


@pytest.mark.parametrize("samples", [[], [[]], [[7]], [[7, 7, 7], [7]]])
def test_no_line_goes_through_one_token(samples: list[list[int]]) -> None:
    assert zipf_coefficient(samples) == 0


def test_all_alike_fall_not_at_all() -> None:
    assert str(zipf_coefficient([[1, 2, 3]])) == "0.0"
