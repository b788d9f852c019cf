"""Shingles, MinHashes and keys, compared with sets of n-grams and with datasketch."""

import random
from unittest import mock

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.similarity import (
    MIN_CANDIDATE_RECALL,
    Hashes,
    band_keys,
    choose_bands,
    hash_ngrams,
    jaccard,
    make_set,
    minhash,
)

WORDS = st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"]), min_size=1, max_size=30)


def ngrams(words: list[bytes], size: int) -> set[tuple[bytes, ...]]:
    size = min(size, len(words))
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def shingles(words: list[bytes], size: int) -> Hashes:
    return make_set(hash_ngrams([b" ".join(words)], size)[0])


@given(WORDS, WORDS, st.integers(1, 6))
def test_jaccard_of_shingles_is_that_of_the_ngram_sets(first: list[bytes], second: list[bytes], size: int) -> None:
    a, b = ngrams(first, size), ngrams(second, size)
    # n-grams of different lengths, as when a text is shorter than n, have different hashes because their tuples differ
    assert jaccard(shingles(first, size), shingles(second, size)) == pytest.approx(len(a & b) / len(a | b))


@given(st.lists(WORDS, max_size=6), st.integers(1, 6), st.sampled_from([1, 3, 1 << 14]))
def test_ngrams_of_many_documents_are_those_of_each(documents: list[list[bytes]], size: int, part_bytes: int) -> None:
    alone = [hash_ngrams([b" ".join(words)], size)[0].tolist() for words in documents]
    with mock.patch("pipeline.corpus.similarity._PART_BYTES", part_bytes):
        together = hash_ngrams([b" ".join(words) for words in documents], size)
    assert [hashes.tolist() for hashes in together] == alone
    assert list(map(len, alone)) == [max(1, len(words) - size + 1) for words in documents]


@given(st.lists(st.binary(min_size=1, max_size=9).map(lambda word: word.replace(b" ", b"_")), min_size=1))
def test_a_word_has_one_hash_wherever_it_is(words: list[bytes]) -> None:
    assert hash_ngrams([b" ".join(words)], 1)[0].tolist() == [hash_ngrams([word], 1)[0][0] for word in words]


def test_the_hash_of_a_word_is_its_polynomial() -> None:
    def reference(word: bytes) -> int:
        value = sum(byte * pow(0x9E3779B97F4A7C15, place, 2**64) for place, byte in enumerate(word)) % 2**64
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            value = (value ^ value >> 33) * factor % 2**64
        return value ^ value >> 33

    words = [b"gull", b"rock", "lämpchen".encode(), b"x" * 300_000]  # longer than a part
    assert hash_ngrams([b" ".join(words)], 1)[0].tolist() == list(map(reference, words))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 40_000])
def test_minhash_is_that_of_datasketch(count: int) -> None:
    hashes = shingles([b"%d" % number for number in random.Random(count).choices(range(10**6), k=count)], 3)
    whole = MinHash(num_perm=16, seed=1, hashfunc=int, scheme="affine64")
    whole.update_batch(hashes)
    np.testing.assert_array_equal(minhash(hashes, 16), whole.hashvalues)


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
