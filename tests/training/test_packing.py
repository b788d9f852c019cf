from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel

from pipeline.tokens import TokenArrays
from pipeline.training.packing import IGNORED_LABEL, PackedRows, RowCollator, Window, cut_windows, pack_rows

END = 0

document_tokens = st.lists(st.integers(2, 60), max_size=30)


def token_arrays(documents: Sequence[Sequence[int]]) -> TokenArrays:
    """Arrays of documents given by the ids of their texts alone."""
    tokens, bounds = [END], [0]
    for ids in documents:
        tokens += [*ids, END]
        bounds.append(len(tokens) - 1)
    return TokenArrays(
        tokens=np.array(tokens, dtype=np.uint16),
        bounds=np.array(bounds, dtype=np.int64),
        tokenizer_sha256="",
        vocabulary_size=300,
        end_of_text_id=END,
        text_bytes=0,
        sha256="",
    )


def windows_of(tokens: Sequence[int]) -> list[Window]:
    return [Window(document, 0, count) for document, count in enumerate(tokens)]


@given(document_tokens, st.integers(2, 70))
def test_every_token_but_a_documents_first_is_a_label_once(tokens: list[int], context_length: int) -> None:
    windows = cut_windows(tokens, context_length)
    labels = Counter((window.document, index) for window in windows for index in range(window.start + 1, window.end))
    assert labels == Counter((document, index) for document, count in enumerate(tokens) for index in range(1, count))


@given(document_tokens, st.integers(2, 70))
def test_no_window_is_longer_than_the_context_nor_without_a_label(tokens: list[int], context_length: int) -> None:
    assert all(2 <= window.tokens <= context_length for window in cut_windows(tokens, context_length))


def test_a_window_begins_with_the_last_token_of_the_one_before() -> None:
    assert cut_windows([7, 3], 4) == [Window(0, 0, 4), Window(0, 3, 7), Window(1, 0, 3)]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 100))
def test_every_window_is_in_one_row_that_has_room_for_it(tokens: list[int], row_tokens: int) -> None:
    windows = windows_of(tokens)
    rows = pack_rows(windows, row_tokens)
    assert Counter(window for row in rows for window in row) == Counter(windows)
    assert all(0 < sum(window.tokens for window in row) <= row_tokens for row in rows)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 100))
def test_no_two_rows_would_fit_in_one(tokens: list[int], row_tokens: int) -> None:
    sizes = sorted(sum(window.tokens for window in row) for row in pack_rows(windows_of(tokens), row_tokens))
    assert len(sizes) == 1 or sizes[0] + sizes[1] > row_tokens


def test_best_fit_needs_fewer_rows_than_filling_in_order() -> None:
    # In order: 6 | 5 4 | 4 6 | 5, as 10 tokens fit in a row.
    rows = pack_rows(windows_of([6, 5, 4, 4, 6, 5]), 10)
    assert [[window.tokens for window in row] for row in rows] == [[6, 4], [6, 4], [5, 5]]


def test_a_window_goes_where_least_room_is_left() -> None:
    rows = pack_rows(windows_of([8, 6, 2]), 10)
    assert [[window.tokens for window in row] for row in rows] == [[8, 2], [6]]


def test_equal_windows_keep_the_order_of_their_documents() -> None:
    rows = pack_rows(windows_of([3] * 7), 6)
    assert [[window.document for window in row] for row in rows] == [[0, 1], [2, 3], [4, 5], [6]]


def test_a_window_longer_than_a_row_has_one_of_its_own() -> None:
    assert pack_rows(windows_of([12, 3]), 5) == [[Window(0, 0, 12)], [Window(1, 0, 3)]]


def test_a_row_holds_ids_labels_and_positions_of_its_windows() -> None:
    rows = PackedRows(token_arrays([[5, 6], [7]]), context_length=8, row_tokens=8)
    assert len(rows) == 1
    row = {name: values.tolist() for name, values in rows[0].items()}
    assert row == {
        "input_ids": [END, 5, 6, END, END, 7, END],
        "labels": [IGNORED_LABEL, 5, 6, END, IGNORED_LABEL, 7, END],
        "position_ids": [0, 1, 2, 3, 0, 1, 2],
    }
    assert all(values.dtype == torch.int64 for values in rows[0].values())


def test_positions_restart_in_each_window_of_a_long_document() -> None:
    rows = PackedRows(token_arrays([[5, 6, 7]]), context_length=3, row_tokens=6)
    row = {name: values.tolist() for name, values in rows[0].items()}
    assert row == {
        "input_ids": [END, 5, 6, 6, 7, END],
        "labels": [IGNORED_LABEL, 5, 6, IGNORED_LABEL, 7, END],
        "position_ids": [0, 1, 2, 0, 1, 2],
    }


def test_rows_have_room_for_the_context_at_least() -> None:
    rows = PackedRows(token_arrays([[5] * 10]), context_length=12, row_tokens=4)
    assert (rows.row_tokens, len(rows)) == (12, 1)


def test_padding_share_is_what_full_rows_hold_no_token_of() -> None:
    rows = PackedRows(token_arrays([[5] * 6, [6] * 3]), context_length=10, row_tokens=10)
    assert len(rows) == 2
    assert rows.padding_share == pytest.approx((20 - 8 - 5) / 20)


def test_batches_are_padded_without_labels_nor_mask() -> None:
    rows = PackedRows(token_arrays([[5, 6, 7], [8]]), context_length=6, row_tokens=6)
    batch = RowCollator(end_of_text_id=9)([rows[0], rows[1]])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[END, 5, 6, 7, END], [END, 8, END, 9, 9]],
        "labels": [[IGNORED_LABEL, 5, 6, 7, END], [IGNORED_LABEL, 8, END, IGNORED_LABEL, IGNORED_LABEL]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]],
    }
    assert all(values.dtype == torch.int64 for values in batch.values())


LEAK_DOCUMENTS = [[40, 41, 42, 43, 44, 45, 46], [50, 51, 52, 53], [60, 61], [70, 71, 72]]


def row_logits(model: GPT2LMHeadModel, documents: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of each document, `[tokens, vocabulary]`, in one batch of packed rows as the trainer feeds it."""
    rows = PackedRows(token_arrays(documents), context_length=16, row_tokens=16)
    batch = RowCollator(END)([rows[index] for index in range(len(rows))])
    model.config.use_cache = False
    with torch.inference_mode():
        logits = model(**batch).logits
    found: dict[int, torch.Tensor] = {}
    for index, row in enumerate(rows.rows):
        start = 0
        for window in row:
            found[window.document] = logits[index, start : start + window.tokens]
            start += window.tokens
    assert max(len(row) for row in rows.rows) > 1
    return [found[document] for document in range(len(documents))]


@pytest.mark.parametrize("changed", range(len(LEAK_DOCUMENTS)))
def test_a_packed_document_changes_no_other(changed: int, tiny_model: GPT2LMHeadModel) -> None:
    before = row_logits(tiny_model, LEAK_DOCUMENTS)
    documents = [
        [token_id + 100 for token_id in ids] if index == changed else ids for index, ids in enumerate(LEAK_DOCUMENTS)
    ]
    after = row_logits(tiny_model, documents)
    for document in range(len(documents)):
        difference = (before[document] - after[document]).abs().max().item()
        assert difference > 1 if document == changed else difference <= 1e-6


def test_a_packed_document_gives_the_logits_that_it_gives_alone(tiny_model: GPT2LMHeadModel) -> None:
    for ids, packed in zip(LEAK_DOCUMENTS, row_logits(tiny_model, LEAK_DOCUMENTS), strict=True):
        with torch.inference_mode():
            alone = tiny_model(torch.tensor([[END, *ids, END]]), use_cache=False).logits[0]
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_with_a_cache_packed_documents_would_leak(tiny_model: GPT2LMHeadModel) -> None:
    """Why training turns the cache off; once this fails, transformers has mended it."""
    rows = PackedRows(token_arrays(LEAK_DOCUMENTS), context_length=16, row_tokens=16)
    batch = RowCollator(END)([rows[0]])
    with torch.inference_mode():
        apart, leaking = (tiny_model(**batch, use_cache=use_cache).logits for use_cache in (False, True))
    assert (apart - leaking).abs().max().item() > 1
