"""How long the longest passages are that a model has copied from its training text.

Verbatim copies as the measure of memorization: Carlini et al. 2023, "Quantifying Memorization Across Neural Language
Models". They ask whether a continuation of a given length is a copy; here the longest copy is measured.

Runs of tokens are compared by name (Karp, Miller and Rosenberg 1972): two runs of one length have the same name exactly
when they are equal. A run of up to twice the length is known by the names of the two runs that cover it, its beginning
and its end. So the length doubles until no sample has a match, and the exact one is found by halving. Nothing rests on
hashes; memory is linear in the training text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.quality.ngrams import TokenIds

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

NO_NAME = -1
CHUNK_TOKENS = 1 << 20


class Copies(NamedTuple):
    """The longest copy of each sample, int64 [samples] each; the starts are -1 where the length is 0."""

    lengths_tokens: Int64s
    sample_starts: Int64s
    training_starts: Int64s


def longest_copies(samples: Sequence[TokenIds], training_ids: npt.NDArray[np.integer]) -> Copies:
    """The longest run of each sample that stands verbatim in the training text, and a place where it stands there.

    `training_ids` [tokens] is the training text, its documents divided by an end-of-text that no sample holds; it may
    be mapped from a file. Of several longest runs of a sample the first is given.
    """
    search = _Search(samples)
    runs = search.single_tokens(training_ids)
    matched = search.record(runs)
    while matched.any():
        doubled = _lengthened(runs, 2 * runs.length_tokens)
        matched_doubled = search.record(doubled)
        search.halve(runs, matched & ~matched_doubled, runs.length_tokens, 2 * runs.length_tokens)
        runs, matched = doubled, matched_doubled
    return search.copies


def copied_tokens(
    samples: Sequence[TokenIds], training_ids: npt.NDArray[np.integer], length_tokens: int
) -> list[Bools]:
    """Which tokens of each sample lie in a run of at least so many that stands verbatim in the training text."""
    search = _Search(samples)
    runs = search.single_tokens(training_ids)
    while runs.length_tokens < length_tokens:
        runs = _lengthened(runs, min(2 * runs.length_tokens, length_tokens))
    copied = np.zeros(len(search.joined_ids), dtype=bool)
    for offset in range(length_tokens):
        copied[np.flatnonzero(runs.sample_names != NO_NAME) + offset] = True
    return [copied[start : start + len(sample)] for start, sample in zip(search.starts, samples, strict=True)]


@dataclass(frozen=True)
class _Runs:
    """The runs of one length that stand both in the joined samples and in the training text."""

    length_tokens: int
    sample_names: Int32s
    """Name of the run from each position of the joined samples on, or `NO_NAME`."""
    training_names: Int32s
    """Name of the run from each position of the training text on, or `NO_NAME`."""
    places: Int64s
    """For each name a position of the training text; at the end -1, for `NO_NAME`."""


class _Search:
    """The samples, joined, and the longest copies found so far."""

    def __init__(self, samples: Sequence[TokenIds]) -> None:
        # A token without a name closes each sample: no shared run goes past it.
        closed = [np.append(np.asarray(sample, dtype=np.int64), NO_NAME) for sample in samples]
        sizes = np.array([len(sample) for sample in closed], dtype=np.int64)
        self.joined_ids = np.concatenate([np.empty(0, dtype=np.int64), *closed])
        self.owners = np.repeat(np.arange(len(samples)), sizes)
        self.starts = np.cumsum(sizes) - sizes
        self.copies = Copies(*(np.full(len(samples), value, dtype=np.int64) for value in (0, -1, -1)))

    def single_tokens(self, training_ids: npt.NDArray[np.integer]) -> _Runs:
        chunks = (
            training_ids[start : start + CHUNK_TOKENS].astype(np.int64)
            for start in range(0, len(training_ids), CHUNK_TOKENS)
        )
        return _shared(1, self.joined_ids, chunks)

    def record(self, runs: _Runs) -> Bools:
        """Note the runs, longer than any noted before, as their samples' longest; tell which samples have one."""
        matched = np.zeros(len(self.starts), dtype=bool)
        positions = np.flatnonzero(runs.sample_names != NO_NAME)
        samples, first = np.unique(self.owners[positions], return_index=True)
        matched[samples] = True
        self.copies.lengths_tokens[samples] = runs.length_tokens
        self.copies.sample_starts[samples] = positions[first] - self.starts[samples]
        self.copies.training_starts[samples] = runs.places[runs.sample_names[positions[first]]]
        return matched

    def halve(self, runs: _Runs, samples: Bools, low: int, high: int) -> None:
        """Find the longest runs of `samples`, all of which have a match of `low` tokens and none of `high`.

        Samples that stand at the same length share a pass over the training text.
        """
        if high - low < 2 or not samples.any():
            return
        middle = (low + high) // 2
        own_names = np.where(samples[self.owners[: len(runs.sample_names)]], runs.sample_names, NO_NAME)
        matched = self.record(_lengthened(replace(runs, sample_names=own_names), middle))
        self.halve(runs, matched, middle, high)
        self.halve(runs, samples & ~matched, low, middle)


def _lengthened(runs: _Runs, length_tokens: int) -> _Runs:
    """The shared runs of a greater length, at most twice that of `runs`."""
    offset = length_tokens - runs.length_tokens
    chunks = (
        _pairs(runs.training_names[start : start + CHUNK_TOKENS + offset], offset)
        for start in range(0, len(runs.training_names) - offset, CHUNK_TOKENS)
    )
    return _shared(length_tokens, _pairs(runs.sample_names, offset), chunks)


def _pairs(names: Int32s, offset: int) -> Int64s:
    """Each name and the one `offset` further on as one number; `NO_NAME` where either is missing."""
    beginnings, ends = names[: max(0, len(names) - offset)], names[offset:]
    nameless = (beginnings == NO_NAME) | (ends == NO_NAME)
    return np.where(nameless, NO_NAME, (beginnings.astype(np.int64) << 32) | ends)


def _shared(length_tokens: int, sample_keys: Int64s, training_keys: Iterable[Int64s]) -> _Runs:
    """Name the runs by their keys; a run of the samples that the training text lacks gets no name."""
    keys = np.unique(sample_keys[sample_keys != NO_NAME])
    training_names = np.concatenate([np.empty(0, dtype=np.int32), *(_names(keys, chunk) for chunk in training_keys)])
    places = np.full(len(keys) + 1, -1, dtype=np.int64)
    positions = np.flatnonzero(training_names != NO_NAME)
    places[training_names[positions]] = positions
    sample_names = _names(keys, sample_keys)
    return _Runs(length_tokens, np.where(places[sample_names] < 0, NO_NAME, sample_names), training_names, places)


def _names(keys: Int64s, wanted: Int64s) -> Int32s:
    """Index in the sorted `keys` of each wanted one, or `NO_NAME`."""
    names = np.full(len(wanted), NO_NAME, dtype=np.int32)
    candidates = np.flatnonzero(wanted != NO_NAME)
    indices = np.searchsorted(keys, wanted[candidates])
    found = np.append(keys, NO_NAME)[indices] == wanted[candidates]
    names[candidates[found]] = indices[found]
    return names
