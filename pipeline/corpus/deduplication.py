"""Find exact and near-duplicates; only the first of them in file order is kept."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from pipeline.params.prepare import NearDuplicateParams

MIN_CANDIDATE_RECALL = 0.999
"""The probability that the index finds a pair that is just alike enough; what it finds is compared exactly."""

Hashes = NDArray[np.uint64]

_SCHEME = "affine64"  # datasketch's 64-bit permutations: shingles are 64-bit hashes already
_SEED = 1
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplication modulo 2**64 loses nothing
_BATCH_SHINGLES = 1 << 14  # limits memory, which grows with shingles times permutations, for a book as one document


@dataclass(frozen=True, slots=True)
class Repeat:
    """The reason why a document is dropped, and the one that it repeats."""

    reason: Literal["exact_duplicate", "near_duplicate"]
    source: str
    jaccard: float
    """The similarity of the two sets of shingles; 1 for an exact duplicate."""


class Deduplicator:
    """The digests, shingles and MinHashes of the documents kept so far, without their texts."""

    def __init__(self, params: NearDuplicateParams) -> None:
        self._min_jaccard = params.jaccard
        self._permutations = params.permutations
        self._index = MinHashLSH(num_perm=params.permutations, params=choose_bands(params.permutations, params.jaccard))
        self._by_digest: dict[bytes, str] = {}
        self._kept: list[tuple[str, Hashes]] = []

    def admit(self, source: str, digest: bytes, shingles: Hashes, signature: Hashes) -> Repeat | None:
        """Keep a document, or return the kept one that it repeats: the first that is alike enough.

        `digest` is that of its normalized words, `shingles` and `signature` are the results of `shingle` and `minhash`.
        """
        if digest in self._by_digest:
            return Repeat("exact_duplicate", self._by_digest[digest], 1.0)
        sketch = _make_sketch(self._permutations, signature)
        for kept in sorted(self._index.query(sketch)):
            kept_source, kept_shingles = self._kept[kept]
            similarity = jaccard(shingles, kept_shingles)
            if similarity >= self._min_jaccard:
                return Repeat("near_duplicate", kept_source, similarity)
        self._index.insert(len(self._kept), sketch)
        self._by_digest[digest] = source
        self._kept.append((source, shingles))
        return None


def choose_bands(permutations: int, min_jaccard: float) -> tuple[int, int]:
    """Choose bands and rows of the LSH index: as many rows as recall allows, and at least two bands.

    A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman and Ullman, Mining
    of Massive Datasets, 3.4.2).
    """
    for rows in range(permutations // 2, 1, -1):
        if 1 - (1 - min_jaccard**rows) ** (permutations // rows) >= MIN_CANDIDATE_RECALL:
            return permutations // rows, rows
    return permutations, 1


def shingle(words: Sequence[str], ngram_words: int) -> Hashes:
    """Return the sorted distinct 64-bit hashes of the word n-grams; a shorter text is one n-gram."""
    hashes = np.fromiter(map(_hash_word, words), dtype=np.uint64, count=len(words))
    ngram_words = min(ngram_words, len(words))
    positions = len(words) - ngram_words + 1
    ngrams = np.zeros(positions, dtype=np.uint64)
    for offset in range(ngram_words):
        factor = np.uint64(pow(_MULTIPLIER, offset, 2**64))
        ngrams += hashes[offset : offset + positions] * factor
    return np.unique(ngrams)


def minhash(shingles: Hashes, permutations: int) -> Hashes:
    """Return the MinHash of a set of shingles (Broder 1997), shape (permutations,)."""
    sketch = _empty_sketch(permutations).copy()
    for start in range(0, len(shingles), _BATCH_SHINGLES):
        sketch.update_batch(shingles[start : start + _BATCH_SHINGLES])
    values: Hashes = sketch.hashvalues
    return values


def jaccard(first: Hashes, second: Hashes) -> float:
    """Return the Jaccard similarity of two sets, each sorted and distinct."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


@lru_cache(maxsize=1 << 18)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


@cache
def _empty_sketch(permutations: int) -> Any:
    return MinHash(num_perm=permutations, seed=_SEED, hashfunc=int, scheme=_SCHEME)


def _make_sketch(permutations: int, signature: Hashes) -> Any:
    sketch = _empty_sketch(permutations).copy()
    sketch.hashvalues = signature
    return sketch
