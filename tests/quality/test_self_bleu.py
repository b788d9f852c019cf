"""Self-BLEU, compared with NLTK's BLEU of each sample against the others."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from pipeline.quality.self_bleu import EPSILON, bleu_against_others, self_bleu

same_examples = settings(derandomize=True, deadline=None)


def bleu_of_nltk(samples: list[list[int]] | list[list[str]], n: int) -> list[float]:
    return [
        sentence_bleu(
            samples[:index] + samples[index + 1 :],
            sample,
            weights=[1 / n] * n,
            smoothing_function=SmoothingFunction().method1,
        )
        for index, sample in enumerate(samples)
    ]


# Few tokens and many lengths: n-grams are shared, stand more than once, and are missing.
@same_examples
@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=2, max_size=7), st.integers(1, 5))
def test_bleu_is_nltks(samples: list[list[int]], n: int) -> None:
    expected = bleu_of_nltk(samples, n)
    np.testing.assert_allclose(bleu_against_others(samples, n), expected, rtol=1e-12)
    assert self_bleu(samples, n) == pytest.approx(sum(expected) / len(expected))


@same_examples
@given(st.lists(st.lists(st.sampled_from(["a", "b", "a b", ""]), max_size=9), min_size=2, max_size=5))
def test_words_are_tokens_too(samples: list[list[str]]) -> None:
    np.testing.assert_allclose(bleu_against_others(samples, 2), bleu_of_nltk(samples, 2), rtol=1e-12)


def test_arrays_are_samples_too() -> None:
    samples = [[1, 2, 3, 4], [1, 2, 3, 5]]
    arrays = [np.array(sample, dtype=np.uint16) for sample in samples]
    assert self_bleu(arrays, 3) == self_bleu(samples, 3)


def test_many_long_samples_as_nltk_has_them() -> None:
    rng = np.random.default_rng(5)
    samples = [rng.zipf(1.5, size=size).clip(max=300).tolist() for size in rng.integers(1, 80, 25)]
    np.testing.assert_allclose(bleu_against_others(samples, 4), bleu_of_nltk(samples, 4), rtol=1e-12)


def test_bleu_by_hand() -> None:
    samples = [[1, 1, 1, 2], [1, 1, 3], [2, 9, 9, 9, 9]]
    # Of the first: 1 counts twice, as in the second, and 2 once; 1 1 once of its two. The nearest length is 3, not 5.
    # Of the second: 1 twice, and 1 1; the nearest length is 4. Of the third: 2, and no pair.
    expected = [
        math.sqrt(3 / 4 * 1 / 3),
        math.exp(1 - 4 / 3) * math.sqrt(2 / 3 * 1 / 2),
        math.sqrt(1 / 5 * EPSILON / 4),
    ]
    np.testing.assert_allclose(bleu_against_others(samples, 2), expected)


def test_samples_all_the_same_have_1_and_without_a_common_token_0() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3, 4) == pytest.approx(1)
    assert self_bleu([[1, 2], [3, 4]], 2) == 0


@pytest.mark.parametrize("samples", [[], [[]], [[1, 2, 3]], [[], []], [[], [7]]])
def test_alone_or_empty_a_sample_resembles_nothing(samples: list[list[int]]) -> None:
    assert self_bleu(samples, 4) == 0
    assert bleu_against_others(samples, 4).tolist() == [0] * len(samples)


def test_one_token_each() -> None:
    # No pair counts as one pair that is not matched.
    assert self_bleu([[7], [7], [7]], 2) == pytest.approx(math.sqrt(EPSILON))
