"""Cut documents into windows, deal windows to optimizer steps, and make batches that leak nothing across documents.

A batch is one flat sequence of windows, without padding. It carries the bounds of the windows, so that attention keeps
them apart. The seed alone fixes what an optimizer step learns from; the number of batches it is cut into, on one device
or several, changes nothing but rounding, and which units dropout drops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from pipeline.tokens import TokenArrays

IGNORED_LABEL = -100
"""The label that `torch.nn.functional.cross_entropy` ignores by default."""

Batch = dict[str, torch.Tensor | int]


@dataclass(frozen=True, slots=True)
class TrainingWindow:
    """The tokens `start` to `end` (exclusive) of a document; the first is context, every other is a label."""

    document: int
    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


def cut_windows(document_tokens: ArrayLike, context_length: int) -> NDArray[np.int64]:
    """Cut documents into windows of at most `context_length` tokens: the fields of `TrainingWindow`, `[windows, 3]`.

    `document_tokens` counts each document's tokens with both end-of-texts. A window begins with the last token of the
    one before, so that every token but a document's first is a label exactly once.
    """
    tokens = np.asarray(document_tokens, dtype=np.int64)
    counts = np.maximum(1, -(-(tokens - 1) // (context_length - 1)))
    documents = np.repeat(np.arange(len(tokens)), counts)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * (context_length - 1)
    return np.stack((documents, starts, np.minimum(starts + context_length, tokens[documents])), axis=1)


def deal(sizes: ArrayLike, groups: int) -> NDArray[np.int64]:
    """Cut a sequence of items of these sizes into consecutive groups of about equal size.

    Returns the bounds, `[groups + 1]`: group i holds `bounds[i]` to `bounds[i + 1]` (exclusive). An item goes to the
    group that contains its middle, so a group is off its share by at most half an item at either end. A group that
    contains no middle takes an item of a neighbor; groups are empty only if they outnumber the items.
    """
    ends = np.cumsum(sizes, dtype=np.float64)
    middles = ends - np.asarray(sizes) / 2
    shares = np.linspace(0, ends[-1] if len(ends) else 0, groups + 1)
    bounds = np.searchsorted(middles, shares)
    bounds[-1] = len(middles)
    if groups > len(middles):
        return bounds
    # Each bound at least one above the one before, and low enough for those after it.
    index = np.arange(groups + 1)
    return np.minimum(np.maximum.accumulate(bounds - index), len(middles) - groups) + index


class PackedSteps(Dataset[Batch]):
    """The batches of all optimizer steps, in order; the `parts` batches of a step are consecutive."""

    def __init__(
        self,
        tokens: TokenArrays,
        *,
        context_length: int,
        batch_tokens: int,
        epochs: float = 1,
        seed: int | None = None,
        parts: int = 1,
        share: float = 1.0,
    ) -> None:
        """Deal the windows of a share of the documents to steps of about `batch_tokens`, at least one window each.

        Without a seed, windows keep the order of their documents; with one, each epoch has its own order. A larger
        share includes the documents of every smaller one.
        """
        self.tokens = tokens
        is_taken = np.zeros(len(tokens), dtype=bool)
        is_taken[np.random.default_rng(seed).permutation(len(tokens))[: math.ceil(share * len(tokens))]] = True
        windows = cut_windows(tokens.document_tokens(), context_length)
        # An array, because a large text has millions of windows.
        self.windows = windows[is_taken[windows[:, 0]]]
        self.seed = seed
        self.parts = parts
        self.steps_per_epoch = max(1, min(round(self.window_tokens / batch_tokens), len(self.windows)))
        self.steps = math.ceil(self.steps_per_epoch * epochs)
        self._epoch = lru_cache(maxsize=1)(self._deal_epoch)

    @property
    def window_tokens(self) -> int:
        """Count the tokens of all windows; a token that two windows share counts twice."""
        return int((self.windows[:, 2] - self.windows[:, 1]).sum())

    def __len__(self) -> int:
        return self.steps * self.parts

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        step, part = divmod(index, self.parts)
        windows = self.step_windows(step)
        bounds = deal([window.tokens for window in windows], self.parts)
        return self.batch(windows[bounds[part] : bounds[part + 1]])

    def step_windows(self, step: int) -> list[TrainingWindow]:
        """Return the windows that optimizer step `step` (from 0) learns from."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order, bounds = self._epoch(epoch)
        return [TrainingWindow(*fields) for fields in self.windows[order[bounds[step] : bounds[step + 1]]].tolist()]

    def _deal_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the order of the windows in an epoch, and the bounds of its steps in that order."""
        order = np.arange(len(self.windows))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return order, deal((self.windows[:, 2] - self.windows[:, 1])[order], self.steps_per_epoch)

    def batch(self, windows: Sequence[TrainingWindow]) -> Batch:
        """Return windows as one sequence: `input_ids`, `labels` and `position_ids`, each int64 `[1, tokens]`.

        `cu_seq_lens_q` and `cu_seq_lens_k`, int32 `[windows + 1]`, are the bounds of the windows, `max_length_q` and
        `max_length_k` the longest length: the names that transformers' models pass on to their attention. A window's
        first token is not a label: nothing before it in the batch belongs to its document. Without windows, the batch
        holds one end-of-text and no label, so that a device without work keeps step with the others.
        """
        ids = [self.tokens.document(window.document)[window.start : window.end] for window in windows]
        sequences = [np.asarray(part, dtype=np.int64) for part in ids] or [np.array([self.tokens.end_of_text_id])]
        labels = [np.concatenate([[IGNORED_LABEL], part[1:]]) for part in sequences]
        positions = [np.arange(len(part)) for part in sequences]
        lengths = [len(part) for part in sequences]
        bounds = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        flat = {"input_ids": sequences, "labels": labels, "position_ids": positions}
        return {
            **{name: torch.from_numpy(np.concatenate(parts))[None] for name, parts in flat.items()},
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }


def only_batch(batches: Sequence[Batch]) -> Batch:
    """Collate for a data loader in which every item is already a batch."""
    (batch,) = batches
    return batch
