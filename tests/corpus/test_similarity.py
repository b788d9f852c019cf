"""Shingles, MinHashes and keys, compared with sets of n-grams and with datasketch."""

import random

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.similarity import (
    MIN_CANDIDATE_RECALL,
    band_keys,
    choose_bands,
    fingerprint,
    jaccard,
    minhash,
    shingle,
)
from pipeline.corpus.words import digest, normalize_words

WORDS = st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"]), min_size=1, max_size=30)


def ngrams(words: list[bytes], size: int) -> set[tuple[bytes, ...]]:
    size = min(size, len(words))
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


@given(WORDS, WORDS, st.integers(1, 6))
def test_jaccard_of_shingles_is_that_of_the_ngram_sets(first: list[bytes], second: list[bytes], size: int) -> None:
    a, b = ngrams(first, size), ngrams(second, size)
    # n-grams of different lengths, as when a text is shorter than n, have different hashes because their tuples differ
    assert jaccard(shingle(first, size), shingle(second, size)) == pytest.approx(len(a & b) / len(a | b))


def test_a_fingerprint_is_the_digest_and_the_shingles_of_the_normalized_words() -> None:
    text = "It's  THE\n_Old_ clock—No. 7! It’s the old clock."
    found, shingles = fingerprint(text, 3)
    assert found == digest(normalize_words(text))
    np.testing.assert_array_equal(shingles, shingle([word.encode() for word in normalize_words(text)], 3))
    nothing, none = fingerprint("— … !", 3)
    assert (nothing, none.tolist()) == (b"", [])


@pytest.mark.parametrize("count", [1, 255, 256, 257, 40_000])
def test_minhash_is_that_of_datasketch(count: int) -> None:
    numbers = random.Random(count)
    shingles = shingle([str(numbers.randrange(10**6)).encode() for _ in range(count)], 3)
    whole = MinHash(num_perm=16, seed=1, hashfunc=int, scheme="affine64")
    whole.update_batch(shingles)
    np.testing.assert_array_equal(minhash(shingles, 16), whole.hashvalues)


@pytest.mark.parametrize("min_jaccard", [0.3, 0.6, 0.8, 0.95, 0.999])
def test_bands_find_a_pair_just_alike_enough(min_jaccard: float) -> None:
    band_count, rows = choose_bands(128, min_jaccard)
    assert band_count * rows <= 128
    assert 1 - (1 - min_jaccard**rows) ** band_count >= MIN_CANDIDATE_RECALL


def test_documents_have_the_keys_of_the_bands_in_which_they_agree() -> None:
    signatures = np.arange(24, dtype=np.uint64).reshape(2, 12)
    signatures[1, 3:9] = signatures[0, 3:9]
    keys = band_keys(signatures, 4, 3)
    assert (keys[0] == keys[1]).tolist() == [False, True, True, False]
    # A band's values in another band are another key.
    assert len(set(band_keys(np.ones((1, 12), np.uint64), 4, 3)[0].tolist())) == 4
