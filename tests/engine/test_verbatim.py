"""The index of a training text, and the limit on copies from it, against plain searches of every document."""

import tempfile
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decoding import SamplingParams
from pipeline.engine.filters import filter_logits, sample, verbatim_ids
from pipeline.engine.sampler import Continuation
from pipeline.engine.verbatim import CopyLimiter, VerbatimText, open_index
from pipeline.export import verbatim
from pipeline.export.verbatim import find_blocks, sort_suffixes, write_index
from pipeline.quality.memorization import longest_copies

END_OF_TEXT = 0
VOCABULARY = 6

Documents = list[list[int]]

documents = st.lists(st.lists(st.integers(1, VOCABULARY - 1), max_size=12), max_size=6)
dtypes = st.sampled_from([np.uint16, np.uint32])


def joined(texts: Documents, dtype: type = np.uint16) -> np.ndarray:
    """The documents as `pipeline.tokens` stores them."""
    return np.array([END_OF_TEXT, *chain.from_iterable([*text, END_OF_TEXT] for text in texts)], dtype)


def occurs(run: list[int], texts: Documents) -> bool:
    return any(text[i : i + len(run)] == run for text in texts for i in range(len(text)))


def write(folder: Path, texts: Documents, dtype: type = np.uint16) -> None:
    tokens = joined(texts, dtype)
    write_index(folder, tokens, np.flatnonzero(tokens == END_OF_TEXT))


def lookup(texts: Documents, dtype: type = np.uint16) -> VerbatimText:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "index"), texts, dtype)
        return VerbatimText(open_index(Path(folder, "index")), END_OF_TEXT)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3) | st.integers(0, 65535), min_size=1, max_size=60), dtypes)
def test_suffixes_are_sorted(tokens: list[int], dtype: type) -> None:
    found = sort_suffixes(np.array(tokens, dtype)).tolist()
    assert found == sorted(range(len(tokens)), key=lambda position: tokens[position:])


@pytest.mark.parametrize("tokens", [[7], [7] * 33, [1, 2] * 16 + [1]])
def test_suffixes_of_a_text_that_repeats_itself_are_sorted(tokens: list[int]) -> None:
    found = sort_suffixes(np.array(tokens, np.uint16)).tolist()
    assert found == sorted(range(len(tokens)), key=lambda position: tokens[position:])


@settings(max_examples=300, deadline=None)
@given(
    documents,
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
    dtypes,
    st.sampled_from([1, 5, 1 << 24]),
)
def test_followers_are_found_wherever_a_run_occurs(
    texts: Documents, run: list[int], dtype: type, block_tokens: int
) -> None:
    expected = [token_id for token_id in range(1, VOCABULARY) if occurs([*run, token_id], texts)]
    with mock.patch.object(verbatim, "BLOCK_TOKENS", block_tokens):
        assert list(lookup(texts, dtype).followers(run)) == expected


def test_blocks_end_where_documents_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbatim, "BLOCK_TOKENS", 6)
    # The ends of documents of 3, 1, 9 and 2 tokens, after the end-of-text that precedes all.
    assert find_blocks(np.array([0, 4, 6, 16, 19])) == [0, 7, 17, 20]
    assert find_blocks(np.array([0, 4])) == [0, 5]
    assert find_blocks(np.array([0])) == [0, 1]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_order_is_that_of_numbers_and_not_of_their_bytes(dtype: type) -> None:
    # Least significant byte first, 256 would come before 1.
    assert list(lookup([[5, 1, 9], [5, 256, 9], [5, 255]], dtype).followers([5])) == [1, 255, 256]


def test_an_index_is_kept_in_files(tmp_path: Path) -> None:
    texts = [[1, 2, 3], [2, 3, 4]]
    for name in ("first", "second"):
        write(tmp_path / name, texts)
    names = [file.name for file in sorted((tmp_path / "first").iterdir())]
    assert names == ["blocks.npy", "suffixes.npy", "tokens.npy"]
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    found = VerbatimText(open_index(tmp_path / "first"), END_OF_TEXT).followers([2, 3])
    assert list(found) == [4]
    # As in engines of before, which are one block.
    (tmp_path / "second" / "blocks.npy").unlink()
    found = VerbatimText(open_index(tmp_path / "second"), END_OF_TEXT).followers([2, 3])
    assert list(found) == [4]


@settings(max_examples=300, deadline=None)
@given(
    documents,
    st.integers(1, 4),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
    st.integers(0, 2**32),
    st.sampled_from([(), (2,)]),
    st.booleans(),
)
def test_what_would_be_too_long_a_copy_is_removed_and_nothing_else(
    texts: Documents, most: int, prompt: list[int], seed: int, stop_ids: tuple[int, ...], goes_on: bool
) -> None:
    # A top-k that keeps all: the weights are then summed in float64, as the reference sums them.
    params = SamplingParams(
        max_verbatim_tokens=most, stop_token_ids=stop_ids, ignore_eos=goes_on, seed=seed, top_k=VOCABULARY
    )
    followers = lookup(texts).followers
    logits = np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32)
    continuation = Continuation(params, seed, 0, prompt, END_OF_TEXT, VOCABULARY, followers)
    top_ids = np.argsort(-logits, kind="stable")
    output: list[int] = []
    for _ in range(20):
        ends = {END_OF_TEXT, *stop_ids}
        copied = {t for t in range(VOCABULARY) if len(output) >= most and occurs([*output[-most:], t], texts)}
        left = filter_logits(logits, params, prompt, output, END_OF_TEXT, followers)
        assert set(np.flatnonzero(np.isinf(left)).tolist()) == copied - ends
        drawn = continuation.draw(logits, logits[top_ids], top_ids)
        assert drawn == sample(logits, params, prompt, output, END_OF_TEXT, seed, 0, followers)
        if drawn in continuation.ending_ids:
            break
        output.append(drawn)
        continuation.append(drawn)
    # As the evaluation measures it, document by document: an end-of-text may have been drawn.
    runs: Documents = [[]]
    for token_id in output:
        if token_id == END_OF_TEXT:
            runs.append([])
        else:
            runs[-1].append(token_id)
    assert longest_copies(runs, joined(texts)).max() <= most


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=60), st.lists(st.integers(0, 3), max_size=80), st.integers(1, 16))
def test_copies_are_found_as_the_output_grows(text: list[int], output: list[int], most: int) -> None:
    # Half of the output continues as the text does.
    output = [*output[: len(output) // 2], *text[3:40], *output[len(output) // 2 :]]
    followers = lookup([text]).followers
    copies = CopyLimiter(most, followers)
    for length in range(len(output) + 1):
        head = output[:length]
        assert copies.ids(head) == verbatim_ids(head, most, followers, (END_OF_TEXT,))


def test_little_is_looked_up_where_nothing_is_copied() -> None:
    asked: list[int] = []

    def followers(run: list[int]) -> list[int]:
        asked.append(len(run))
        return []

    copies = CopyLimiter(30, followers)
    for length in range(300):
        assert copies.ids([7] * length) == []
    assert set(asked) == {15}
    assert len(asked) <= 300 / 16


def test_a_copyist_is_stopped_after_so_many_tokens() -> None:
    """A model that always prefers to continue as the training text does."""
    text = list(range(1, 40))
    followers = lookup([text]).followers
    params = SamplingParams(max_verbatim_tokens=7, temperature=0)
    continuation = Continuation(params, 0, 0, [1, 2, 3], END_OF_TEXT, 41, followers)
    ids = np.zeros(0, np.int64)
    for _ in range(30):
        last = continuation.output_ids[-1] if continuation.output_ids else 3
        logits = np.zeros(41, np.float32)
        logits[(last + 1) % 41] = 9
        logits[40] = 5
        continuation.append(continuation.draw(logits, logits[ids], ids))
    # The prompt does not count: seven tokens are copied after it.
    assert continuation.output_ids[:9] == [4, 5, 6, 7, 8, 9, 10, 40, 0]
    assert longest_copies([continuation.output_ids[:8]], joined([text])).tolist() == [7]


def test_end_of_text_can_be_drawn_where_every_other_token_would_copy() -> None:
    texts = [[1, token_id] for token_id in range(1, VOCABULARY)]
    params = SamplingParams(max_verbatim_tokens=1)
    left = filter_logits(np.zeros(VOCABULARY, np.float32), params, [], [1], END_OF_TEXT, lookup(texts).followers)
    assert np.flatnonzero(np.isfinite(left)).tolist() == [END_OF_TEXT]


def test_the_limit_needs_to_know_the_text() -> None:
    with pytest.raises(ValueError, match="what follows a run in the training text"):
        filter_logits(np.zeros(4, np.float32), SamplingParams(max_verbatim_tokens=1), [], [1], 0)
