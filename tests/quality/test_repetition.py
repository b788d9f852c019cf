"""Repetition within samples: seq-rep-n and loops."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.quality.repetition import is_looping, mark_repeats, rep_n


@pytest.mark.parametrize(
    ("token_ids", "n", "expected"),
    [
        ([1, 2, 1, 2, 1], 1, 1 - 2 / 5),
        ([1, 2, 1, 2, 1], 2, 1 - 2 / 4),
        ([1, 2, 1, 2, 1], 3, 1 - 2 / 3),
        ([7, 7, 7, 7], 2, 1 - 1 / 3),
        ([1, 2, 3], 1, 0),
        ([7], 1, 0),
        ([7], 4, 0),
        ([], 4, 0),
    ],
)
def test_rep_n_is_the_share_of_ngrams_seen_before(token_ids: list[int], n: int, expected: float) -> None:
    assert rep_n(token_ids, n) == pytest.approx(expected)


@given(st.lists(st.integers(0, 3)), st.integers(1, 4))
def test_rep_n_against_a_set_of_tuples(token_ids: list[int], n: int) -> None:
    tuples = list(zip(*(token_ids[i:] for i in range(n)), strict=False))
    assert rep_n(token_ids, n) == pytest.approx(1 - len(set(tuples)) / len(tuples) if tuples else 0)


@pytest.mark.parametrize(
    ("token_ids", "n", "expected"),
    [
        ([1, 2, 3, 1, 2, 4], 2, [0, 0, 0, 1, 1, 0]),
        ([7, 7, 7], 2, [0, 1, 1]),
        ([1, 2, 1], 2, [0, 0, 0]),
        ([1], 2, [0]),
        ([], 2, []),
    ],
)
def test_repeated_tokens_by_hand(token_ids: list[int], n: int, expected: list[int]) -> None:
    assert mark_repeats(token_ids, n).tolist() == [bool(mark) for mark in expected]


@given(st.lists(st.integers(0, 3)), st.integers(1, 4))
def test_repeated_tokens_are_those_of_the_ngrams_that_rep_n_counts(token_ids: list[int], n: int) -> None:
    seen, marked = set(), set()
    for start in range(len(token_ids) - n + 1):
        ngram = tuple(token_ids[start : start + n])
        if ngram in seen:
            marked |= set(range(start, start + n))
        seen.add(ngram)
    assert set(mark_repeats(token_ids, n).nonzero()[0].tolist()) == marked


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], True),  # cut off in the middle
        ([9, 8, 1, 2, 3, 1, 2, 3, 1, 2], False),  # two and two thirds
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 9], False),  # left the loop
        ([9, 5, 5, 5], True),
        ([9, 5, 5], False),
        ([1, 2, 3, 4] * 3, False),  # longer than the 3 tokens asked for
        ([], False),
        ([5], False),
    ],
)
def test_loop_is_an_end_of_three_equal_ngrams_of_three_tokens_at_most(token_ids: list[int], expected: bool) -> None:
    assert is_looping(token_ids, max_ngram_tokens=3, repeats=3) is expected


@given(
    st.lists(st.integers(0, 9)),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(2, 4),
    st.integers(5, 9),
)
def test_any_repeated_end_is_a_loop(beginning: list[int], ngram: list[int], repeats: int, longest: int) -> None:
    assert is_looping(beginning + ngram * repeats, longest, repeats)


@given(st.lists(st.integers(0, 1), max_size=24), st.integers(1, 5), st.integers(2, 4), st.integers(1, 5))
def test_loop_against_its_definition(token_ids: list[int], longest: int, repeats: int, shortest: int) -> None:
    ends = (token_ids[-n:] * repeats for n in range(shortest, longest + 1) if n * repeats <= len(token_ids))
    assert is_looping(token_ids, longest, repeats, shortest) == any(token_ids[-len(end) :] == end for end in ends)
