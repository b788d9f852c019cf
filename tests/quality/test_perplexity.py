"""Perplexity, bits per byte, and the windows in which a long document is scored."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.quality.perplexity import ScoringWindow, bits_per_byte, perplexity, plan_windows


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity(np.log(np.full(7, 1 / 50))) == pytest.approx(50)


def test_perplexity_is_the_inverse_geometric_mean() -> None:
    assert perplexity(np.log([0.5, 0.125])) == pytest.approx(4)


def test_perplexity_of_certainty_is_1_and_of_the_impossible_infinite() -> None:
    assert perplexity(np.zeros(3)) == 1
    assert perplexity(np.array([-1.0, -math.inf])) == math.inf
    assert perplexity(np.array([-1e6])) == math.inf


def test_float32_is_summed_in_float64() -> None:
    logprobs = np.full(3_000_000, -0.1, dtype=np.float32)
    exact = float(np.float32(0.1))
    assert perplexity(logprobs) == pytest.approx(math.exp(exact), rel=1e-12)
    assert bits_per_byte(logprobs, 1_000_000) == pytest.approx(3 * exact / math.log(2), rel=1e-12)


def test_bits_per_byte_counts_every_token_and_only_the_bytes_of_the_text() -> None:
    # "é!" has 3 bytes; two tokens and the closing end-of-text cost 2 + 3 + 1 bits.
    logprobs = np.log([1 / 4, 1 / 8, 1 / 2])
    assert bits_per_byte(logprobs, len("é!".encode())) == pytest.approx(2)


def test_bits_per_byte_do_not_depend_on_how_text_is_cut_into_tokens() -> None:
    coarse, fine = np.log([1 / 16, 1 / 2]), np.log([1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2])
    assert bits_per_byte(coarse, 5) == pytest.approx(bits_per_byte(fine, 5))


def test_nothing_scored_is_an_error() -> None:
    with pytest.raises(UserError, match="no token was scored"):
        perplexity(np.empty(0))
    with pytest.raises(UserError, match="the texts have no bytes"):
        bits_per_byte(np.array([-1.0]), 0)


@pytest.mark.parametrize(
    ("document_tokens", "windows"),
    [
        (0, []),
        (1, []),
        (2, [ScoringWindow(0, 2, 1)]),
        (8, [ScoringWindow(0, 8, 1)]),
        (9, [ScoringWindow(0, 8, 1), ScoringWindow(1, 9, 8)]),
        (11, [ScoringWindow(0, 8, 1), ScoringWindow(3, 11, 8)]),
        (15, [ScoringWindow(0, 8, 1), ScoringWindow(3, 11, 8), ScoringWindow(6, 14, 11), ScoringWindow(7, 15, 14)]),
    ],
)
def test_windows_by_hand(document_tokens: int, windows: list[ScoringWindow]) -> None:
    assert plan_windows(document_tokens, context_length=8, stride_tokens=3) == windows


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_each_token_but_the_first_is_scored_once_from_enough_context(
    document_tokens: int, context_length: int, data: st.DataObject
) -> None:
    stride_tokens = data.draw(st.integers(1, context_length - 1))
    windows = plan_windows(document_tokens, context_length, stride_tokens)
    scored = [token for _, end, first_scored in windows for token in range(first_scored, end)]
    assert scored == list(range(1, document_tokens))
    for start, end, first_scored in windows:
        assert 0 <= start < first_scored < end <= document_tokens
        assert end - start <= context_length
        assert start == 0 or first_scored - start >= context_length - stride_tokens
        assert start == 0 or end - start == context_length
    for before, after in pairwise(windows):
        assert 0 < after.start - before.start <= stride_tokens


@pytest.mark.parametrize("stride_tokens", [8, 9])
def test_stride_that_leaves_no_context_is_refused(stride_tokens: int) -> None:
    message = rf"^evaluate\.stride_tokens: {stride_tokens} is out of range, must be below the context length \(8\)$"
    with pytest.raises(UserError, match=message):
        plan_windows(100, context_length=8, stride_tokens=stride_tokens)
