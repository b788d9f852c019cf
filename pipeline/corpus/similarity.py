"""How alike documents are: sets of word n-grams (shingles), their Jaccard similarity, and keys that find candidates.

Two documents share one of the keys of their MinHashes (Broder 1997) with a probability near 1 if they are alike, and
near 0 if they are not (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4).
"""

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.words import word_bytes

MIN_CANDIDATE_RECALL = 0.999
"""The probability that a pair that is just alike enough shares a key; candidates are compared exactly."""

Hashes = NDArray[np.uint64]

_SEED = 1
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplication modulo 2**64 loses nothing
_BATCH_SHINGLES = 1 << 9  # a book as one document: memory grows with shingles times permutations
_MOST_WORDS = 1 << 17


class _WordHashes(dict[bytes, bytes]):
    """The 64-bit hashes of words, of which most have been seen before."""

    def __missing__(self, word: bytes) -> bytes:
        if len(self) == _MOST_WORDS:
            self.clear()
        self[word] = found = hashlib.blake2b(word, digest_size=8).digest()
        return found


_WORD_HASHES = _WordHashes()


def fingerprint(text: str, ngram_words: int) -> tuple[bytes, Hashes]:
    """Return the SHA-256 of a text's normalized words, and its shingles; of a text without words, both are empty."""
    words = word_bytes(text)
    if not words:
        return b"", np.empty(0, dtype=np.uint64)
    return hashlib.sha256(b" ".join(words)).digest(), shingle(words, ngram_words)


def shingle(words: Sequence[bytes], ngram_words: int) -> Hashes:
    """Return the sorted distinct 64-bit hashes of the n-grams of words in UTF-8; a shorter text is one n-gram."""
    hashes = np.frombuffer(b"".join(map(_WORD_HASHES.__getitem__, words)), dtype="<u8")
    ngram_words = min(ngram_words, len(hashes))
    positions = len(hashes) - ngram_words + 1
    ngrams = np.zeros(positions, dtype=np.uint64)
    for offset in range(ngram_words):
        ngrams += hashes[offset : offset + positions] * _factor(offset)
    ngrams.sort()  # faster than np.unique, which hashes first
    return ngrams[np.concatenate(([True], ngrams[1:] != ngrams[:-1]))]


def minhash(shingles: Hashes, permutations: int) -> Hashes:
    """Return the MinHash of a set of shingles, shape (permutations,), as the scheme `affine64` of datasketch 2."""
    factors, terms = _permutations(permutations)
    smallest = np.full(permutations, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(shingles), _BATCH_SHINGLES):
        mixed = _mix(shingles[start : start + _BATCH_SHINGLES])
        values = _buffer(permutations)[: len(mixed)]
        np.multiply(mixed[:, None], factors, out=values)
        values += terms
        np.minimum(smallest, values.min(axis=0), out=smallest)
    return smallest


def jaccard(first: Hashes, second: Hashes) -> float:
    """Return the Jaccard similarity of two sets, each sorted and distinct."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


@cache
def choose_bands(permutations: int, min_jaccard: float) -> tuple[int, int]:
    """Choose the bands, each a key, and the rows of each: as many rows as recall allows, and at least two bands.

    A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands (Leskovec et al., 3.4.2).
    """
    for rows in range(permutations // 2, 1, -1):
        if 1 - (1 - min_jaccard**rows) ** (permutations // rows) >= MIN_CANDIDATE_RECALL:
            return permutations // rows, rows
    return permutations, 1


def band_keys(signatures: Hashes, bands: int, rows: int) -> Hashes:
    """Return the keys of MinHashes, (documents, bands): two documents that agree in a band have the same key there."""
    cut = signatures[:, : bands * rows].reshape(-1, bands, rows)
    keys = np.tile(np.arange(bands, dtype=np.uint64), (len(cut), 1))
    for row in range(rows):
        keys = _mix(keys + cut[:, :, row])
    return keys


def _mix(values: Hashes) -> Hashes:
    """Return the finalizer of MurmurHash3 (fmix64), a bijection that spreads its input over all bits."""
    values = values ^ values >> np.uint64(33)
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


@cache
def _factor(offset: int) -> np.uint64:
    """Return the factor of a word's hash at its offset in an n-gram."""
    return np.uint64(pow(_MULTIPLIER, offset, 2**64))


@cache
def _buffer(permutations: int) -> Hashes:
    """Return the memory of a batch; memory that is new for each document takes a third more time."""
    return np.empty((_BATCH_SHINGLES, permutations), dtype=np.uint64)


@cache
def _permutations(count: int) -> tuple[Hashes, Hashes]:
    """Return the factors, which are odd, and the terms of the permutations x * factor + term modulo 2**64."""
    draw = np.random.RandomState(_SEED)  # its stream is frozen, and the one that datasketch draws from
    factors = draw.randint(0, 2**63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return factors, draw.randint(0, 2**64, count, dtype=np.uint64)
