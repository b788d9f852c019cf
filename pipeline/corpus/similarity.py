"""How alike documents are: sets of word n-grams (shingles), their Jaccard similarity, and keys that find candidates.

Two documents share one of the keys of their MinHashes (Broder 1997) with a probability near 1 if they are alike, and
near 0 if they are not (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4).
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

MIN_CANDIDATE_RECALL = 0.999
"""The probability that a pair that is just alike enough shares a key; candidates are compared exactly."""

Hashes = NDArray[np.uint64]

_SEED = 1
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplication modulo 2**64 loses nothing
_BATCH_SHINGLES = 1 << 9  # a book as one document: memory grows with shingles times permutations
_PART_BYTES = 1 << 14
"""The size of the parts of a text in which words are hashed; a part ends with a word."""


def hash_ngrams(documents: Sequence[bytes], ngram_words: int) -> list[Hashes]:
    """Return the 64-bit hashes of the n-grams of words of each document, in order; fewer words are one n-gram.

    A document is its words with a space between two (`join_words`), and has at least one.
    """
    if not documents:
        return []
    hashes = np.concatenate([_hash_words(part) for part in _parts(b" ".join(documents))])
    word_counts = np.array([document.count(b" ") + 1 for document in documents])
    ngram_words = min(ngram_words, int(word_counts.max()))
    # Behind each document are zeros for the words that an n-gram may lack.
    zeros = ngram_words - 1
    shifts = zeros * np.arange(len(documents))
    padded = np.zeros(len(hashes) + zeros * len(documents), np.uint64)
    padded[np.arange(len(hashes)) + np.repeat(shifts, word_counts)] = hashes
    ngrams = np.zeros(len(padded) - zeros, np.uint64)
    for offset in range(ngram_words):
        ngrams += padded[offset : offset + len(ngrams)] * np.uint64(pow(_MULTIPLIER, offset, 2**64))
    starts = np.cumsum(word_counts) - word_counts + shifts
    sizes = np.maximum(1, word_counts - zeros)
    return [ngrams[start : start + size] for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]


def make_set(hashes: Hashes) -> Hashes:
    """Return the distinct hashes in order."""
    hashes = np.sort(hashes)  # faster than np.unique, which hashes first
    return hashes[np.concatenate(([True], hashes[1:] != hashes[:-1]))]


def minhash(shingles: Hashes, permutations: int) -> Hashes:
    """Return the MinHash of shingles, shape (permutations,), as the scheme `affine64` of datasketch 2."""
    factors, terms = _permutations(permutations)
    smallest = np.full(permutations, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(shingles), _BATCH_SHINGLES):
        mixed = mix(shingles[start : start + _BATCH_SHINGLES])
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
        keys = mix(keys + cut[:, :, row])
    return keys


def _parts(words: bytes) -> Iterator[bytes]:
    """Yield parts of at most `_PART_BYTES`, and longer words alone."""
    start = 0
    while start < len(words):
        end = start + _PART_BYTES
        if end < len(words):
            end = words.rfind(b" ", start, end + 1)
            end = words.find(b" ", start) if end < 0 else end
        end = len(words) if end < 0 else end
        yield words[start:end]
        start = end + 1


def _hash_words(words: bytes) -> Hashes:
    """Return the 64-bit hash of each word: a polynomial of its bytes (Karp and Rabin 1987), mixed.

    The sum over a word is the difference of two sums from the beginning of `words`, divided by the power of its place.
    """
    powers, inverses = _powers(_PART_BYTES)
    if len(words) > _PART_BYTES:
        return mix(np.array([_hash_long_word(words, powers)], np.uint64))
    sums = np.frombuffer(words, np.uint8) * powers[: len(words)]
    np.cumsum(sums, out=sums)
    spaces = np.flatnonzero(np.frombuffer(words, np.uint8) == ord(" "))
    ends = np.append(sums[spaces - 1], sums[-1:])
    starts = np.append(np.zeros(1, np.uint64), sums[spaces])
    ends -= starts
    ends[1:] *= inverses[spaces + 1]
    return mix(ends)


def _hash_long_word(word: bytes, powers: Hashes) -> int:
    total = 0
    for start in range(0, len(word), _PART_BYTES):
        part = np.frombuffer(word, np.uint8)[start : start + _PART_BYTES]
        total += int(np.sum(part * powers[: len(part)])) * pow(_MULTIPLIER, start, 2**64)
    return total % 2**64


@cache
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Return the powers of the multiplier modulo 2**64, and their inverses."""
    powers = [np.ones(1, np.uint64), np.ones(1, np.uint64)]
    for index, base in enumerate((_MULTIPLIER, pow(_MULTIPLIER, -1, 2**64))):
        while len(powers[index]) < count:
            factor = np.uint64(pow(base, len(powers[index]), 2**64))
            powers[index] = np.concatenate((powers[index], powers[index] * factor))
    return powers[0], powers[1]


def mix(values: Hashes) -> Hashes:
    """Return the finalizer of MurmurHash3 (fmix64), a bijection that spreads its input over all bits."""
    values = values ^ values >> np.uint64(33)
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


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
