"""distinct-n over a set of samples."""

import pytest

from pipeline.quality.diversity import distinct_n


@pytest.mark.parametrize(
    ("samples", "n", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 1, 4 / 6),
        ([[1, 2, 3], [1, 2, 4]], 2, 3 / 4),
        ([[7, 7, 7], [7, 7]], 1, 1 / 5),
        ([[1, 2], [3]], 2, 1),  # no n-gram spans two samples
        ([[5]], 1, 1),
        ([[5]], 2, 0),
        ([[]], 1, 0),
        ([], 1, 0),
    ],
)
def test_distinct_n_pools_the_ngrams_of_all_samples(samples: list[list[int]], n: int, expected: float) -> None:
    assert distinct_n(samples, n) == pytest.approx(expected)
