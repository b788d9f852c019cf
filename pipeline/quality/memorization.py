"""The longest passages that samples have copied verbatim from the training text.

Verbatim copies as the measure of memorization: Carlini et al. 2023, "Quantifying Memorization Across Neural Language
Models". They ask whether a continuation of a given length is a copy; here the length of the longest copy is measured.

Runs of tokens are compared by name (Karp, Miller and Rosenberg 1972): two runs of one length have the same name exactly
when they are equal. A run of up to twice that length is identified by the names of the two runs that cover it, at its
beginning and at its end. So the length doubles until no sample has a match, and bisection finds the exact length. There
are no hashes that could collide. The training text is read in blocks, so that memory does not grow with it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.quality.ngrams import TokenIds

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

NO_NAME = -1
CHUNK_TOKENS = 1 << 20
BLOCK_TOKENS = 1 << 24
"""The tokens of the training text that are compared at a time, of which each takes up to 16 bytes of memory."""


def longest_copies(samples: Sequence[TokenIds], training_ids: npt.NDArray[np.integer]) -> Int64s:
    """Return the length of the longest run of each sample that occurs verbatim in the training text, int64 [samples].

    `training_ids` [tokens] is the training text, with an end-of-text between documents that no sample contains; it may
    be mapped from a file.
    """
    longest = np.zeros(len(samples), np.int64)
    for block in _blocks(training_ids, max(map(len, samples), default=0)):
        np.maximum(longest, _longest_in(samples, block), out=longest)
    return longest


def _longest_in(samples: Sequence[TokenIds], training_ids: npt.NDArray[np.integer]) -> Int64s:
    search = _Search(samples)
    runs = search.name_tokens(training_ids)
    matched = search.record(runs)
    while matched.any():
        doubled = _lengthen(runs, 2 * runs.length_tokens)
        matched_doubled = search.record(doubled)
        search.bisect(runs, matched & ~matched_doubled, runs.length_tokens, 2 * runs.length_tokens)
        runs, matched = doubled, matched_doubled
    return search.longest


def mark_copies(samples: Sequence[TokenIds], training_ids: npt.NDArray[np.integer], length_tokens: int) -> list[Bools]:
    """Mark the tokens of each sample in runs of at least `length_tokens` that occur verbatim in the training text."""
    marks = [np.zeros(len(sample), dtype=bool) for sample in samples]
    for block in _blocks(training_ids, length_tokens):
        for own, found in zip(marks, _mark_in(samples, block, length_tokens), strict=True):
            own |= found
    return marks


def _blocks(training_ids: npt.NDArray[np.integer], longest: int) -> Iterator[npt.NDArray[np.integer]]:
    """Yield parts of the training text that overlap, so that each run of up to `longest` tokens is whole in one."""
    for start in range(0, len(training_ids), BLOCK_TOKENS):
        yield training_ids[start : start + BLOCK_TOKENS + longest]


def _mark_in(samples: Sequence[TokenIds], training_ids: npt.NDArray[np.integer], length_tokens: int) -> list[Bools]:
    search = _Search(samples)
    runs = search.name_tokens(training_ids)
    while runs.length_tokens < length_tokens:
        runs = _lengthen(runs, min(2 * runs.length_tokens, length_tokens))
    copied = np.zeros(len(search.joined_ids), dtype=bool)
    for offset in range(length_tokens):
        copied[np.flatnonzero(runs.sample_names != NO_NAME) + offset] = True
    return [copied[start : start + len(sample)] for start, sample in zip(search.starts, samples, strict=True)]


@dataclass(frozen=True)
class _Runs:
    """The runs of one length that occur both in the joined samples and in the training text."""

    length_tokens: int
    sample_names: Int32s
    """The name of the run that begins at each position of the joined samples, or `NO_NAME`."""
    training_names: Int32s
    """The name of the run that begins at each position of the training text, or `NO_NAME`."""


class _Search:
    """The samples, joined, and the lengths of the longest copies found so far."""

    def __init__(self, samples: Sequence[TokenIds]) -> None:
        # A token without a name closes each sample: no shared run extends past it.
        closed = [np.append(np.asarray(sample, dtype=np.int64), NO_NAME) for sample in samples]
        sizes = np.array([len(sample) for sample in closed], dtype=np.int64)
        self.joined_ids = np.concatenate([np.empty(0, dtype=np.int64), *closed])
        self.owners = np.repeat(np.arange(len(samples)), sizes)
        self.starts = np.cumsum(sizes) - sizes
        self.longest = np.zeros(len(samples), dtype=np.int64)

    def name_tokens(self, training_ids: npt.NDArray[np.integer]) -> _Runs:
        chunks = (
            training_ids[start : start + CHUNK_TOKENS].astype(np.int64)
            for start in range(0, len(training_ids), CHUNK_TOKENS)
        )
        return _name_shared(1, self.joined_ids, chunks)

    def record(self, runs: _Runs) -> Bools:
        """Record the runs, longer than any before, as the longest of their samples; return which samples have one."""
        matched = np.zeros(len(self.starts), dtype=bool)
        matched[self.owners[np.flatnonzero(runs.sample_names != NO_NAME)]] = True
        self.longest[matched] = runs.length_tokens
        return matched

    def bisect(self, runs: _Runs, samples: Bools, low: int, high: int) -> None:
        """Find the longest runs of `samples`, each of which has a match of `low` tokens but none of `high`.

        Samples with the same bounds share a pass over the training text.
        """
        if high - low < 2 or not samples.any():
            return
        middle = (low + high) // 2
        own_names = np.where(samples[self.owners[: len(runs.sample_names)]], runs.sample_names, NO_NAME)
        matched = self.record(_lengthen(replace(runs, sample_names=own_names), middle))
        self.bisect(runs, matched, middle, high)
        self.bisect(runs, samples & ~matched, low, middle)


def _lengthen(runs: _Runs, length_tokens: int) -> _Runs:
    """Return the shared runs of a greater length, at most twice that of `runs`."""
    offset = length_tokens - runs.length_tokens
    chunks = (
        _pair_names(runs.training_names[start : start + CHUNK_TOKENS + offset], offset)
        for start in range(0, len(runs.training_names) - offset, CHUNK_TOKENS)
    )
    return _name_shared(length_tokens, _pair_names(runs.sample_names, offset), chunks)


def _pair_names(names: Int32s, offset: int) -> Int64s:
    """Combine each name and the one `offset` further on into one number; `NO_NAME` if either is missing."""
    beginnings, ends = names[: max(0, len(names) - offset)], names[offset:]
    nameless = (beginnings == NO_NAME) | (ends == NO_NAME)
    return np.where(nameless, NO_NAME, (beginnings.astype(np.int64) << 32) | ends)


def _name_shared(length_tokens: int, sample_keys: Int64s, training_keys: Iterable[Int64s]) -> _Runs:
    """Name the runs by their keys; runs of the samples that are missing from the training text get no name."""
    keys = np.unique(sample_keys[sample_keys != NO_NAME])
    training_names = np.concatenate([np.empty(0, dtype=np.int32), *(_look_up(keys, chunk) for chunk in training_keys)])
    # One more, at the end, for `NO_NAME`.
    occurs = np.zeros(len(keys) + 1, dtype=bool)
    occurs[training_names[training_names != NO_NAME]] = True
    sample_names = _look_up(keys, sample_keys)
    return _Runs(length_tokens, np.where(occurs[sample_names], sample_names, NO_NAME), training_names)


def _look_up(keys: Int64s, wanted: Int64s) -> Int32s:
    """Return the index of each wanted key in the sorted `keys`, or `NO_NAME`."""
    names = np.full(len(wanted), NO_NAME, dtype=np.int32)
    candidates = np.flatnonzero(wanted != NO_NAME)
    indices = np.searchsorted(keys, wanted[candidates])
    found = np.append(keys, NO_NAME)[indices] == wanted[candidates]
    names[candidates[found]] = indices[found]
    return names
