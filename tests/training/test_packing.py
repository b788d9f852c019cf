from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tokens import TokenArrays
from pipeline.training.attention import PACKED, padded_attention
from pipeline.training.objective import ScoredGPT2
from pipeline.training.packing import IGNORED_LABEL, PackedSteps, TrainingWindow, cut_windows, deal

END = 0

document_tokens = st.lists(st.integers(2, 60), max_size=30)


def token_arrays(documents: Sequence[Sequence[int]]) -> TokenArrays:
    """Return the arrays of documents, given by the ids of their texts without end-of-texts."""
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


@given(document_tokens, st.integers(2, 70))
def test_every_token_but_a_documents_first_is_a_label_once(tokens: list[int], context_length: int) -> None:
    windows = cut_windows(tokens, context_length).tolist()
    labels = Counter((document, index) for document, start, end in windows for index in range(start + 1, end))
    assert labels == Counter((document, index) for document, count in enumerate(tokens) for index in range(1, count))


@given(document_tokens, st.integers(2, 70))
def test_no_window_is_longer_than_the_context_nor_without_a_label(tokens: list[int], context_length: int) -> None:
    windows = cut_windows(tokens, context_length).tolist()
    assert all(2 <= TrainingWindow(*window).tokens <= context_length for window in windows)


def test_a_window_begins_with_the_last_token_of_the_one_before() -> None:
    assert cut_windows([7, 3], 4).tolist() == [[0, 0, 4], [0, 3, 7], [1, 0, 3]]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 12))
def test_groups_are_consecutive_and_off_their_share_by_at_most_one_item(sizes: list[int], groups: int) -> None:
    bounds = deal(sizes, groups).tolist()
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(sizes), groups + 1)
    assert bounds == sorted(bounds)
    assert len(sizes) < groups or all(start < end for start, end in pairwise(bounds))
    for start, end in pairwise(bounds):
        assert abs(sum(sizes[start:end]) - sum(sizes) / groups) <= max(sizes, default=0)


@pytest.mark.parametrize(
    ("sizes", "groups", "bounds"),
    [
        ([3, 3], 4, [0, 0, 1, 1, 2]),
        ([1, 1, 1, 1, 40], 5, [0, 1, 2, 3, 4, 5]),
        ([40, 1, 1, 1, 1], 5, [0, 1, 2, 3, 4, 5]),
        ([9, 1, 1, 1, 9], 3, [0, 1, 4, 5]),
        ([20, 1, 1, 1], 2, [0, 1, 4]),
        ([1, 1, 1, 20], 3, [0, 2, 3, 4]),
    ],
)
def test_a_group_is_empty_only_if_there_are_too_few_items(sizes: list[int], groups: int, bounds: list[int]) -> None:
    assert deal(sizes, groups).tolist() == bounds


@given(
    st.lists(st.integers(2, 3000), min_size=1, max_size=40),
    st.integers(2, 1024),
    st.integers(1, 3000),
    st.integers(1, 3),
    st.integers(1, 4),
    st.floats(0.01, 1),
)
def test_every_step_learns_from_a_label(
    tokens: list[int], context_length: int, batch_tokens: int, batches: int, processes: int, share: float
) -> None:
    arrays = token_arrays([[5] * (count - 2) for count in tokens])
    steps = PackedSteps(
        arrays,
        context_length=context_length,
        batch_tokens=batch_tokens,
        epochs=2,
        seed=1,
        parts=batches * processes,
        share=share,
    )
    assert all(steps.step_windows(step) for step in range(steps.steps))
    # The batches of one step, over all of its processes.
    for index in range(0, len(steps), steps.parts * max(1, steps.steps // 4)):
        batches_of_step = [steps[index + part] for part in range(steps.parts)]
        assert any((batch["labels"] != IGNORED_LABEL).any() for batch in batches_of_step)


@pytest.mark.parametrize("batch_tokens", [200, 256, 300, 350, 700, 8192])
@pytest.mark.parametrize(
    ("lengths", "context_length"),
    [
        # As in the bundled corpus: short pieces and a few of several windows.
        ([342, 371, 60, 395, 512, 289, 310, 1400, 355, 333] * 40, 512),
        ([600] * 300, 1024),
        ([3000] * 60, 1024),
    ],
    ids=["bundled", "articles", "long texts"],
)
def test_windows_longer_than_a_step_leave_no_step_empty(
    lengths: list[int], context_length: int, batch_tokens: int
) -> None:
    arrays = token_arrays([[5] * (length - 2) for length in lengths])
    steps = PackedSteps(arrays, context_length=context_length, batch_tokens=batch_tokens, epochs=2, seed=1)
    dealt = [steps.step_windows(step) for step in range(steps.steps)]
    assert all(dealt)
    assert sum(map(len, dealt)) == 2 * len(steps.windows)
    assert max(sum(window.tokens for window in windows) for windows in dealt) <= batch_tokens + context_length


documents_of_ids = st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=40), min_size=1, max_size=20)


@given(documents_of_ids, st.integers(2, 30), st.integers(1, 200), st.integers(1, 4), st.integers(0, 9))
def test_an_epoch_learns_from_every_label_once(
    documents: list[list[int]], context_length: int, batch_tokens: int, parts: int, seed: int
) -> None:
    steps = PackedSteps(
        token_arrays(documents),
        context_length=context_length,
        batch_tokens=batch_tokens,
        epochs=2,
        seed=seed,
        parts=parts,
    )
    expected = Counter(token_id for ids in documents for token_id in (*ids, END))
    half = len(steps) // 2
    for epoch in (range(half), range(half, 2 * half)):
        labels = Counter(
            label for index in epoch for label in steps[index]["labels"].flatten().tolist() if label != IGNORED_LABEL
        )
        assert labels == expected


@given(documents_of_ids, st.integers(1, 200), st.integers(1, 4))
def test_the_parts_of_a_step_are_the_whole_of_it(documents: list[list[int]], batch_tokens: int, parts: int) -> None:
    whole, cut = (
        PackedSteps(token_arrays(documents), context_length=16, batch_tokens=batch_tokens, seed=3, parts=count)
        for count in (1, parts)
    )
    assert whole.steps == cut.steps
    for step in range(whole.steps):
        batches = [cut[step * parts + part]["labels"][0] for part in range(parts)]
        joined = [label for labels in batches for label in labels.tolist()]
        while len(joined) > len(whole[step]["labels"][0]):
            joined.remove(IGNORED_LABEL)
        assert sorted(joined) == sorted(whole[step]["labels"][0].tolist())


def test_epochs_differ_in_order_and_the_seed_repeats_them() -> None:
    arrays = token_arrays([[index + 1] * 5 for index in range(40)])

    def order(seed: int) -> list[int]:
        steps = PackedSteps(arrays, context_length=16, batch_tokens=40, epochs=2, seed=seed)
        return [window.document for step in range(steps.steps) for window in steps.step_windows(step)]

    first, second = order(1)[:40], order(1)[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert order(1) == order(1) != order(2)


def test_a_share_of_the_documents_is_part_of_every_larger_one() -> None:
    arrays = token_arrays([[index + 1] for index in range(20)])

    def documents(share: float) -> set[int]:
        steps = PackedSteps(arrays, context_length=8, batch_tokens=8, seed=1, share=share)
        return set(steps.windows[:, 0].tolist())

    assert len(documents(0.25)) == 5
    assert documents(0.25) < documents(0.5) < documents(1.0) == set(range(20))


def test_a_batch_holds_ids_labels_positions_and_bounds_of_its_windows() -> None:
    (batch,) = (PackedSteps(token_arrays([[5, 6], [7]]), context_length=8, batch_tokens=8)[index] for index in [0])
    tensors = {name: value.tolist() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert tensors == {
        "input_ids": [[END, 5, 6, END, END, 7, END]],
        "labels": [[IGNORED_LABEL, 5, 6, END, IGNORED_LABEL, 7, END]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2]],
        "cu_seq_lens_q": [0, 4, 7],
        "cu_seq_lens_k": [0, 4, 7],
    }
    assert (batch["max_length_q"], batch["max_length_k"]) == (4, 4)


def test_positions_restart_in_each_window_of_a_long_document() -> None:
    batch = PackedSteps(token_arrays([[5, 6, 7]]), context_length=3, batch_tokens=6)[0]
    assert batch["input_ids"].tolist() == [[END, 5, 6, 6, 7, END]]
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 5, 6, IGNORED_LABEL, 7, END]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]


def test_a_part_without_windows_holds_no_label() -> None:
    steps = PackedSteps(token_arrays([[5, 6]]), context_length=8, batch_tokens=8, parts=2)
    empty = [batch for batch in (steps[0], steps[1]) if not (batch["labels"] != IGNORED_LABEL).any()]
    assert [batch["input_ids"].tolist() for batch in empty] == [[[END]]]


def test_nothing_is_padded() -> None:
    arrays = token_arrays([[5] * length for length in range(1, 30)])
    steps = PackedSteps(arrays, context_length=16, batch_tokens=64, seed=1)
    tokens = sum(steps[index]["input_ids"].shape[1] for index in range(len(steps)))
    assert tokens == steps.window_tokens


LEAK_DOCUMENTS = [[40, 41, 42, 43, 44, 45, 46], [50, 51, 52, 53], [60, 61], [70, 71, 72]]


@pytest.fixture(params=["usual", "by depth", "unscaled"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> ScoredGPT2:
    """The model as it is trained, with each way in which a GPT-2 may scale its attention."""
    changes = {
        "usual": {},
        "by depth": {"scale_attn_by_inverse_layer_idx": True},
        "unscaled": {"scale_attn_weights": False},
    }[request.param]
    return ScoredGPT2.from_pretrained(tiny_checkpoint, attn_implementation=PACKED, **changes).eval()


def packed_logits(model: ScoredGPT2, documents: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the logits of each document, `[tokens, vocabulary]`, from one batch as the trainer feeds it."""
    batch = dict(PackedSteps(token_arrays(documents), context_length=16, batch_tokens=1000)[0])
    bounds = batch["cu_seq_lens_q"]
    del batch["labels"]
    with torch.inference_mode():
        logits = model(**batch).logits[0]
    return [logits[start:end] for start, end in pairwise(bounds.tolist())]


@pytest.mark.parametrize("changed", range(len(LEAK_DOCUMENTS)))
def test_a_packed_document_changes_no_other(changed: int, model: ScoredGPT2) -> None:
    before = packed_logits(model, LEAK_DOCUMENTS)
    documents = [
        [token_id + 100 for token_id in ids] if index == changed else ids for index, ids in enumerate(LEAK_DOCUMENTS)
    ]
    after = packed_logits(model, documents)
    for document in range(len(documents)):
        difference = (before[document] - after[document]).abs().max().item()
        assert difference > 1 if document == changed else difference <= 1e-6


def test_a_packed_document_gives_the_logits_that_it_gives_alone_in_transformers(model: ScoredGPT2) -> None:
    packed = packed_logits(model, LEAK_DOCUMENTS)
    with padded_attention(model), torch.inference_mode():
        alone = [model(torch.tensor([[END, *ids, END]]), use_cache=False).logits[0] for ids in LEAK_DOCUMENTS]
    for found, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
