"""The n-grams of token sequences."""

import numpy as np
import pytest

from pipeline.quality.ngrams import ngrams, unique_share


def test_ngrams_are_every_run_in_order() -> None:
    np.testing.assert_array_equal(ngrams([5, 6, 7, 6], 2), [[5, 6], [6, 7], [7, 6]])


@pytest.mark.parametrize("token_ids", [[], [5], [5, 6]])
def test_fewer_tokens_than_n_have_no_ngram(token_ids: list[int]) -> None:
    assert ngrams(token_ids, 3).shape == (0, 3)


def test_unique_share_counts_equal_rows_once() -> None:
    assert unique_share(np.array([[1, 2], [2, 1], [1, 2], [1, 2]])) == 0.5
    assert unique_share(np.empty((0, 2), dtype=np.int64)) == 1.0
