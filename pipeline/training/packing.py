"""Documents cut into windows, windows packed into rows, rows into batches that leak nothing across documents."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.tokens import TokenArrays

IGNORED_LABEL = -100
"""What `torch.nn.functional.cross_entropy` leaves out by default."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start` to `end` (exclusive) of a document; the first is context, every other one is a label."""

    document: int
    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


def cut_windows(document_tokens: Sequence[int], context_length: int) -> list[Window]:
    """Cut documents, each given by its tokens with both end-of-texts, into windows of at most `context_length`.

    A window begins with the last token of the one before, so that every token but a document's first is a label once.
    """
    return [
        Window(document, start, min(start + context_length, tokens))
        for document, tokens in enumerate(document_tokens)
        for start in range(0, max(tokens - 1, 1), context_length - 1)
    ]


def pack_rows(windows: Sequence[Window], row_tokens: int) -> list[list[Window]]:
    """Put windows into rows of at most `row_tokens`, few of them: longest first, each where least room is left over.

    Best-fit decreasing bin packing; a window longer than `row_tokens` has a row of its own. Rows keep the order in
    which they were opened, and equal windows the order of their documents, so the result is the same each time.
    """
    rows: list[list[Window]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    for window in sorted(windows, key=lambda window: -window.tokens):
        room = next((room for room in range(window.tokens, row_tokens + 1) if rows_by_room[room]), None)
        if room is None:
            row = len(rows)
            rows.append([window])
            room_left = max(row_tokens - window.tokens, 0)
        else:
            row = rows_by_room[room].pop(0)
            rows[row].append(window)
            room_left = room - window.tokens
        rows_by_room[room_left].append(row)
    return rows


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of packed windows over the token arrays of one split."""

    def __init__(self, tokens: TokenArrays, *, context_length: int, row_tokens: int) -> None:
        self.tokens = tokens
        self.row_tokens = max(row_tokens, context_length)
        self.rows = pack_rows(cut_windows(tokens.document_tokens().tolist(), context_length), self.row_tokens)

    @property
    def padding_share(self) -> float:
        """Of full rows, the share that holds no token; a batch pads to its longest row only."""
        return 1 - sum(window.tokens for row in self.rows for window in row) / (len(self.rows) * self.row_tokens)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row: `input_ids`, `labels` and `position_ids`, each int64 `[tokens]`.

        Positions restart with each window: transformers tells packed documents apart by that alone. A window's first
        token is no label: nothing before it in the row belongs to its document.
        """
        input_ids, labels, position_ids = [], [], []
        for window in self.rows[index]:
            ids = np.asarray(self.tokens.document(window.document)[window.start : window.end], dtype=np.int64)
            input_ids.append(ids)
            labels.append(np.concatenate([[IGNORED_LABEL], ids[1:]]))
            position_ids.append(np.arange(len(ids)))
        row = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in row.items()}


@dataclass(frozen=True)
class RowCollator:
    """Rows to a batch: padded on the right to the longest, padding without labels and with positions of its own."""

    end_of_text_id: int

    def __call__(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids`, each int64 `[rows, longest]`; no attention mask.

        An attention mask, even of ones, would make transformers 4.57 take each row for one document.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), longest), self.end_of_text_id),
            "labels": torch.full((len(rows), longest), IGNORED_LABEL),
            "position_ids": torch.zeros((len(rows), longest), dtype=torch.int64),
        }
        for index, row in enumerate(rows):
            for name, values in row.items():
                batch[name][index, : len(values)] = values
        return batch
