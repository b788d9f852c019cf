"""The longest verbatim copy of each sample."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.quality.memorization as memorization
from pipeline.quality.memorization import longest_copies, mark_copies

END_OF_TEXT = 9
TRAINING = np.array([1, 2, 3, 4, 5, END_OF_TEXT, 6, 7, 8, END_OF_TEXT], dtype=np.uint16)


def longest_by_trial(sample: list[int], training: list[int]) -> int:
    """Return the length of the longest run of `sample` in `training`, by trying all."""
    for length in range(min(len(sample), len(training)), 0, -1):
        known = {tuple(training[start : start + length]) for start in range(len(training) - length + 1)}
        if any(tuple(sample[start : start + length]) in known for start in range(len(sample) - length + 1)):
            return length
    return 0


@pytest.mark.parametrize(
    ("sample", "length"),
    [
        ([8, 2, 3, 4, 8], 3),
        ([1, 2, 3, 4, 5], 5),
        ([4, 5, 6, 7, 8], 3),  # 4 5 | 6 7 8 spans two documents
        ([7], 1),
        ([5, 4, 3], 1),
        ([0, 0], 0),
        ([], 0),
    ],
)
def test_longest_copy_by_hand(sample: list[int], length: int) -> None:
    assert longest_copies([sample], TRAINING).tolist() == [length]


def test_copy_spans_no_two_samples() -> None:
    assert longest_copies([[1, 2], [3, 4]], TRAINING).tolist() == [2, 2]


def test_no_samples_have_no_copies() -> None:
    assert longest_copies([], TRAINING).tolist() == []


def test_empty_training_text_was_copied_by_nobody() -> None:
    assert longest_copies([[1, 2]], TRAINING[:0]).tolist() == [0]


def test_one_token_all_over() -> None:
    training = np.zeros(1000, dtype=np.uint16)
    assert longest_copies([[0] * 400, [0] * 37, [0]], training).tolist() == [400, 37, 1]
    assert longest_copies([[0] * 400], training[:123]).tolist() == [123]


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=4),
    st.lists(st.integers(1, 3), max_size=60),
)
def test_longest_copies_against_trial_of_all_runs(samples: list[list[int]], training: list[int]) -> None:
    copies = longest_copies(samples, np.array(training, dtype=np.uint16))
    assert copies.tolist() == [longest_by_trial(sample, training) for sample in samples]


def test_chunks_of_the_training_text_hide_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    training = rng.integers(0, 50, 500).astype(np.uint16)
    starts, lengths = rng.integers(0, 400, 40), rng.integers(1, 100, 40)
    samples = [[60, *training[start : start + length], 60] for start, length in zip(starts, lengths, strict=True)]
    whole = longest_copies(samples, training)
    monkeypatch.setattr(memorization, "CHUNK_TOKENS", 16)
    chunked = longest_copies(samples, training)
    np.testing.assert_array_equal(whole, chunked)
    np.testing.assert_array_equal(whole, lengths)


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=4),
    st.lists(st.integers(1, 3), max_size=60),
    st.integers(1, 9),
    st.integers(1, 6),
)
def test_blocks_of_the_training_text_hide_no_copy(
    samples: list[list[int]], training: list[int], block_tokens: int, length: int
) -> None:
    ids = np.array(training, dtype=np.uint16)
    with mock.patch.object(memorization, "BLOCK_TOKENS", block_tokens):
        copies, marks = longest_copies(samples, ids), mark_copies(samples, ids, length)
        assert all(len(block) <= block_tokens + length for block in memorization._blocks(ids, length))
    np.testing.assert_array_equal(copies, longest_copies(samples, ids))
    for own, whole in zip(marks, mark_copies(samples, ids, length), strict=True):
        np.testing.assert_array_equal(own, whole)


def test_samples_and_training_text_stay_as_they_are() -> None:
    sample, training = np.array([1, 2, 3]), TRAINING.copy()
    sample.setflags(write=False)
    training.setflags(write=False)
    assert longest_copies([sample], training).tolist() == [3]


@given(
    st.lists(st.lists(st.integers(1, 3), max_size=12), max_size=4),
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(1, 7),
)
def test_copied_tokens_against_trial_of_all_runs(samples: list[list[int]], training: list[int], length: int) -> None:
    runs = {tuple(training[start : start + length]) for start in range(len(training) - length + 1)}
    found = mark_copies(samples, np.array(training, dtype=np.uint16), length)
    for sample, copied in zip(samples, found, strict=True):
        starts = [start for start in range(len(sample) - length + 1) if tuple(sample[start : start + length]) in runs]
        expected = {start + offset for start in starts for offset in range(length)}
        assert len(copied) == len(sample)
        assert set(np.flatnonzero(copied).tolist()) == expected
