"""Exact and near-duplicates, compared with sets of n-grams."""

import random

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.deduplication import (
    MIN_CANDIDATE_RECALL,
    Deduplicator,
    Repeat,
    choose_bands,
    jaccard,
    minhash,
    shingle,
)
from pipeline.corpus.words import digest, normalize_words
from pipeline.params.prepare import NearDuplicateParams

PARAMS = NearDuplicateParams(ngram_words=5, jaccard=0.6, permutations=128)
WORDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30)


def ngrams(words: list[str], size: int) -> set[tuple[str, ...]]:
    size = min(size, len(words))
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def admit(deduplicator: Deduplicator, source: str, words: list[str]) -> Repeat | None:
    shingles = shingle(words, PARAMS.ngram_words)
    return deduplicator.admit(source, digest(words), shingles, minhash(shingles, PARAMS.permutations))


def random_words(seed: int, count: int) -> list[str]:
    numbers = random.Random(seed)
    return [f"w{numbers.randrange(10_000)}" for _ in range(count)]


def test_normalized_words_ignore_case_space_and_punctuation() -> None:
    assert normalize_words("It's  THE\n_Old_ clock—No. 7!") == ["it", "s", "the", "old", "clock", "no", "7"]


@given(WORDS, WORDS, st.integers(1, 6))
def test_jaccard_of_shingles_is_that_of_the_ngram_sets(first: list[str], second: list[str], size: int) -> None:
    a, b = ngrams(first, size), ngrams(second, size)
    # n-grams of different lengths, as when a text is shorter than n, have different hashes because their tuples differ
    assert jaccard(shingle(first, size), shingle(second, size)) == pytest.approx(len(a & b) / len(a | b))


def test_minhash_in_batches_equals_datasketch_on_the_whole_set() -> None:
    shingles = shingle(random_words(1, 40_000), 3)
    whole = MinHash(num_perm=16, seed=1, hashfunc=int, scheme="affine64")
    whole.update_batch(shingles)
    np.testing.assert_array_equal(minhash(shingles, 16), whole.hashvalues)


@pytest.mark.parametrize("min_jaccard", [0.3, 0.6, 0.8, 0.95, 1.0])
def test_bands_find_a_pair_just_alike_enough(min_jaccard: float) -> None:
    band_count, rows = choose_bands(128, min_jaccard)
    assert band_count >= 2  # datasketch takes no fewer
    assert band_count * rows <= 128
    assert 1 - (1 - min_jaccard**rows) ** band_count >= MIN_CANDIDATE_RECALL


def test_exact_duplicate_repeats_the_first() -> None:
    deduplicator = Deduplicator(PARAMS)
    words = random_words(2, 50)
    assert admit(deduplicator, "a:1", words) is None
    assert admit(deduplicator, "b:1", words) == Repeat("exact_duplicate", "a:1", 1.0)


@pytest.mark.parametrize("changed", range(0, 60, 4))
def test_exact_jaccard_decides_on_near_duplicates(changed: int) -> None:
    deduplicator = Deduplicator(PARAMS)
    words = random_words(3, 300)
    retold = [f"new{index}" if index < 5 * changed and index % 5 == 0 else word for index, word in enumerate(words)]
    assert admit(deduplicator, "a:1", words) is None
    similarity = len(ngrams(words, 5) & ngrams(retold, 5)) / len(ngrams(words, 5) | ngrams(retold, 5))
    repeat = admit(deduplicator, "a:2", retold)
    if retold == words:
        assert repeat == Repeat("exact_duplicate", "a:1", 1.0)
    elif similarity >= PARAMS.jaccard:
        assert repeat == Repeat("near_duplicate", "a:1", pytest.approx(similarity))
    else:
        assert repeat is None


def test_document_alike_to_a_dropped_one_only_is_kept() -> None:
    deduplicator = Deduplicator(PARAMS)
    words = random_words(4, 200)
    assert admit(deduplicator, "a:1", words) is None
    assert admit(deduplicator, "a:2", words[45:] + random_words(5, 5)) is not None
    assert admit(deduplicator, "a:3", words[90:] + random_words(5, 5)) is None


def test_documents_shorter_than_an_ngram_are_compared() -> None:
    deduplicator = Deduplicator(PARAMS)
    assert admit(deduplicator, "a:1", ["one", "two"]) is None
    assert admit(deduplicator, "a:2", ["two", "one"]) is None
