"""The sampler's kernel, run on the host, draws what the readable reference draws, and updates its state."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sampler_cases import END_OF_TEXT, VOCABULARY, continued, histories, make_logits, near_an_edge, outcome, parameters

from pipeline.decoding import SamplingParams
from pipeline.engine.cuda import driver, kernel, rows
from pipeline.engine.cuda.rows import ASKS_HOST, LOGGED, STATE, STEP_BITS, TAG_BITS, can_be_drawn, row_of
from pipeline.engine.filters import Logits, sample
from pipeline.engine.sampler import Continuation

CONTEXT = 64
FEEDS = 5, 20
"""The token that is fed, and its position."""
TAG = 3 << TAG_BITS

Rows = dict[str, NDArray[Any]]
Launch = Callable[[kernel.Rows, int, int], None]


def stack(rows: list[Rows]) -> Rows:
    return {name: np.stack([row[name] for row in rows]) for name in STATE}


def state_of(continuation: Continuation, left: int = 10) -> Rows:
    """Return a row with a log that an earlier request filled."""
    row = row_of(continuation, *FEEDS, left, TAG, CONTEXT)
    return {**row, "log": np.full(LOGGED, TAG - 1, np.int64)}


def drawn(state: Rows) -> list[list[int | None]]:
    """Return what each row has drawn in its first steps; None if nothing."""
    return [
        [
            int(entry) - first if 0 <= int(entry) - first <= ASKS_HOST else None
            for entry, first in zip(row, range(TAG, TAG + (LOGGED << STEP_BITS), 1 << STEP_BITS), strict=True)
        ]
        for row in state["log"]
    ]


def step(launch: Launch, logits: Logits, state: Rows, threads: int = 3) -> Rows:
    """Run a step on a copy of the state, and return it."""
    arrays = {name: np.ascontiguousarray(values.copy()) for name, values in {"logits": logits, **state}.items()}
    arrays |= {"keys": np.zeros(logits.shape, np.uint32), "weights": np.zeros(logits.shape, np.float32)}
    places = {name: values.ctypes.data for name, values in arrays.items()}
    launch(kernel.Rows(**places, vocabulary=logits.shape[1], context=CONTEXT), len(logits), threads)
    return {name: arrays[name] for name in STATE}


@settings(max_examples=600, deadline=None)
@given(
    parameters,
    histories,
    histories,
    st.integers(0, 10_000),
    st.sampled_from([0.1, 2.0, 6.0]),
    st.sampled_from([2, 16, 2**16]),
    st.integers(0, 3),
    st.sampled_from([(1, 1), (1, 3), (1, 32), (4, 4), (4, 12)]),
)
def test_the_same_token_as_the_reference(
    launch: Launch,
    launch_warps: Launch,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    seed: int,
    spread: float,
    steps: int,
    choice: int,
    shape: tuple[int, int],
) -> None:
    """Whatever the number of threads, and of those in a warp."""
    warp, threads = shape
    continuation = continued(params, prompt, output, choice)
    if not can_be_drawn(continuation):
        return
    logits = make_logits(seed, spread, steps)
    with np.errstate(over="ignore"):
        run = launch if warp == 1 else launch_warps
        after = step(run, logits[None], stack([state_of(continuation)]), threads)
    token_id = drawn(after)[0][0]
    assert params.seed is not None
    expected = outcome(lambda: sample(logits, params, prompt, output, END_OF_TEXT, params.seed or 0, choice))
    if token_id == ASKS_HOST:
        assert not isinstance(expected, int)
        assert after["left"][0, 0] == 0
        return
    if token_id != expected:
        assert near_an_edge(logits, params, prompt, output)


def test_the_books_are_those_of_the_host(launch: Launch) -> None:
    """Twenty steps of three rows side by side: what they draw, and what their state is then."""
    each = [
        SamplingParams(top_k=40, repetition_penalty=1.3),
        SamplingParams(top_p=0.5, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={4: 3.0}),
        SamplingParams(temperature=0, repetition_penalty=1.5, banned_token_ids=(2,)),
    ]
    continuations = [continued(replace(own, seed=7, ignore_eos=True), [1, 2, 3], []) for own in each]
    state = stack([state_of(continuation, left=25) for continuation in continuations])
    for number in range(20):
        logits = np.stack([make_logits(100 * number + row, 1.5, 2**16) for row in range(3)])
        expected = [
            sample(row, own.params, [1, 2, 3], own.output_ids, END_OF_TEXT, 7, 0)
            for row, own in zip(logits, continuations, strict=True)
        ]
        state = step(launch, logits, state)
        entries = state["log"][:, number % LOGGED] - TAG - (number << STEP_BITS)
        assert entries.tolist() == expected
        assert state["input_ids"][:, 0].tolist() == expected
        for continuation, token_id in zip(continuations, expected, strict=True):
            continuation.append(token_id)
    after = stack([state_of(continuation) for continuation in continuations])
    for name in ("bias", "penalty", "offset", "counts"):
        np.testing.assert_array_equal(state[name], after[name], err_msg=name)
    assert state["position_ids"][:, 0].tolist() == [FEEDS[1] + 20] * 3
    assert state["last_positions"].tolist() == [FEEDS[1] + 20] * 3
    assert state["left"][:, 0].tolist() == [5] * 3
    assert state["drawn"][:, 0].tolist() == [20] * 3


def test_a_row_rests_when_it_ends(launch: Launch) -> None:
    """By an ending id, by its last token, and if the host is asked; the others continue."""
    ending = continued(SamplingParams(temperature=0, stop_token_ids=(9,), seed=0), [], [])
    last = continued(SamplingParams(temperature=0, seed=0), [], [])
    asking = continued(SamplingParams(top_p=0.9, seed=1), [], [])
    going = continued(SamplingParams(temperature=0, ignore_eos=True, seed=0), [], [])
    state = stack([state_of(ending), state_of(last, left=1), state_of(asking), state_of(going)])
    logits = np.zeros((4, VOCABULARY), np.float32)
    logits[0, 9] = logits[1, 30] = logits[3, END_OF_TEXT] = 5
    logits[2, 100] = np.nan
    first = step(launch, logits, state)
    assert [row[0] for row in drawn(first)] == [9, 30, ASKS_HOST, END_OF_TEXT]
    assert first["left"][:, 0].tolist() == [0, 0, 0, 9]
    assert first["position_ids"][:, 0].tolist() == [20, 20, 20, 21]
    second = step(launch, logits, first)
    for name, values in second.items():
        np.testing.assert_array_equal(values[:3], first[name][:3], err_msg=name)
    assert drawn(second)[3][:3] == [END_OF_TEXT, END_OF_TEXT, None]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_the_hosts(launch: Launch, bad: float) -> None:
    logits = np.full((1, VOCABULARY), bad, np.float32)
    state = stack([state_of(continued(SamplingParams(seed=1, top_k=5), [], []))])
    assert drawn(step(launch, logits, state))[0][0] == ASKS_HOST


def test_what_looks_at_the_text_is_the_hosts() -> None:
    for params in (
        SamplingParams(no_repeat_ngram_size=2),
        SamplingParams(typical_p=0.9),
        SamplingParams(logprobs=0),
        SamplingParams(min_new_tokens=3),
        SamplingParams(stop_token_ids=tuple(range(10, 18))),
    ):
        assert not can_be_drawn(continued(replace(params, seed=1), [], []))
    later = continued(SamplingParams(min_new_tokens=3, seed=1), [], [5, 6, 7])
    assert can_be_drawn(later)


def test_a_parameter_that_the_device_does_not_state_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    continuation = continued(SamplingParams(top_k=5, min_p=0.1, seed=1), [], [])
    assert can_be_drawn(continuation)
    monkeypatch.setattr(rows, "DEVICE_FIELDS", rows.DEVICE_FIELDS - {"min_p"})
    assert not can_be_drawn(continuation)


def test_a_vocabulary_smaller_than_the_block(launch: Launch) -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    found = []
    for seed in range(400):
        params = SamplingParams(seed=seed, top_k=3, top_p=0.65, top_n_sigma=5, eta_cutoff=1e-3, ignore_eos=True)
        continuation = Continuation(params, seed, 0, [], 3, 4)
        found.append(drawn(step(launch, logits, stack([state_of(continuation)]), threads=6))[0][0])
        assert found[-1] == sample(logits[0], params, [], [], 3, seed, 0)
    assert set(found) == {0, 1}


def test_more_ties_than_the_list_holds(launch: Launch) -> None:
    logits = np.zeros((1, 5000), np.float32)
    logits[0, 4000] = 1
    counts = []
    for seed in range(30):
        params = SamplingParams(seed=seed, top_k=2, ignore_eos=True)
        state = stack([state_of(Continuation(params, seed, 0, [], 3, 5000))])
        counts.append(drawn(step(launch, logits, state))[0][0])
        assert counts[-1] == sample(logits[0], params, [], [], 3, seed, 0)
    assert len(set(counts)) > 20


@pytest.mark.skipif(driver.load(kernel.COMPILER) is None, reason=f"{kernel.COMPILER} is not installed")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_it_compiles_for_a_gpu(capability: str) -> None:
    assert kernel.compile_for(capability).startswith(b"\x7fELF")
