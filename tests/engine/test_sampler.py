"""The fast sampler draws what the readable reference draws, as often as the filtered distribution says."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_cases import (
    END_OF_TEXT,
    STRATEGIES,
    VOCABULARY,
    continued,
    followers,
    histories,
    make_logits,
    near_an_edge,
    outcome,
    parameters,
)

from pipeline.decoding import SamplingParams
from pipeline.engine import sampler
from pipeline.engine.filters import Logits, filter_logits, sample, softmax, uniform
from pipeline.engine.sampler import Continuation


def draw(continuation: Continuation, logits: Logits, listed: int = 20) -> int:
    """Draw the next token from the row and the `listed` likeliest tokens."""
    top_ids = np.argsort(-logits, kind="stable")[:listed]
    return continuation.draw(logits, logits[top_ids], top_ids)


def test_every_parameter_of_the_draw_is_tried() -> None:
    """A new field of `SamplingParams` is either drawn above or has no part in the draw."""
    every = {field.name for field in fields(SamplingParams)}
    assert every - STRATEGIES.keys() == sampler.OUTSIDE_THE_DRAW - {"seed"}
    assert every > sampler.FAST_FIELDS > sampler.OUTSIDE_THE_DRAW


def test_a_parameter_that_the_fast_path_does_not_state_is_left_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[SamplingParams] = []

    def noted(logits: Logits, params: SamplingParams, *_: Any) -> int:
        asked.append(params)
        return 7

    monkeypatch.setattr("pipeline.engine.filters.sample", noted)
    params = SamplingParams(top_k=5, min_p=0.1, seed=1)
    logits = make_logits(0, 3.0, 2**16)
    draw(continued(params, [], []), logits)
    assert asked == []
    monkeypatch.setattr(sampler, "FAST_FIELDS", sampler.FAST_FIELDS - {"min_p"})
    assert draw(continued(params, [], []), logits) == 7
    assert asked == [params]


@settings(max_examples=1500, deadline=None)
@given(
    parameters,
    histories,
    histories,
    st.integers(0, 10_000),
    st.sampled_from([0.1, 2.0, 6.0]),
    st.sampled_from([2, 16, 2**16]),
    st.integers(0, 3),
    st.sampled_from([0, 1, 20, 128, VOCABULARY]),
)
def test_the_same_token_as_the_reference(
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    seed: int,
    spread: float,
    steps: int,
    choice: int,
    listed: int,
) -> None:
    logits = make_logits(seed, spread, steps)
    before = logits.copy()
    assert params.seed is not None
    continuation = continued(params, prompt, output, choice)
    drawn = outcome(lambda: draw(continuation, logits, listed))
    arguments = (params, prompt, output, END_OF_TEXT, params.seed, choice, followers)
    expected = outcome(lambda: sample(before, *arguments))
    np.testing.assert_array_equal(logits, before)
    if drawn != expected:
        # Only the mass of a whole row is summed from float32 weights.
        assert params.top_k == 0
        assert near_an_edge(before, params, prompt, output)


exact = STRATEGIES | {
    "top_n_sigma": st.just(0.0) | st.floats(0.01, 6),
    "eta_cutoff": st.just(0.0) | st.floats(0, 0.5),
    "typical_p": st.just(1.0),
    "allowed_token_ids": st.just(()),
}
of_top_k = st.builds(SamplingParams, **exact | {"top_k": st.sampled_from([1, 5, 40, 300, 700])})
of_the_row = st.builds(SamplingParams, **exact | {"top_k": st.just(0), "top_p": st.just(1.0)})


@settings(max_examples=500)
@given(
    of_top_k | of_the_row,
    histories,
    histories,
    st.integers(0, 10_000),
    st.sampled_from([0.1, 2.0, 6.0]),
    st.sampled_from([2, 16, 2**16]),
    st.sampled_from([0, 20, 128, VOCABULARY]),
)
def test_top_n_sigma_and_eta_draw_exactly_what_the_reference_draws(
    params: SamplingParams, prompt: list[int], output: list[int], seed: int, spread: float, steps: int, listed: int
) -> None:
    """They see the reference's logits in its order, so that not even rounding differs."""
    if not (params.top_n_sigma or params.eta_cutoff):
        return
    logits = make_logits(seed, spread, steps)
    drawn = outcome(lambda: draw(continued(params, prompt, output), logits, listed))
    arguments = (params, prompt, output, END_OF_TEXT, params.seed or 0, 0, followers)
    assert drawn == outcome(lambda: sample(logits, *arguments))


@pytest.mark.parametrize("values", [{"top_k": 20}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize(
    "further", [{"top_n_sigma": 2.5}, {"eta_cutoff": 0.05}, {"top_n_sigma": 1.5, "eta_cutoff": 0.1}]
)
def test_top_n_sigma_and_eta_need_no_more_than_the_list_if_it_holds_what_is_left(
    values: dict[str, Any], further: dict[str, float]
) -> None:
    logits = make_logits(3, 2.0, 2**16)
    ids = np.argsort(-logits, kind="stable")[:128]
    drawn = set()
    for seed in range(50):
        params = SamplingParams(**values, **further)
        u = uniform(seed, 0, 0)
        token_id = sampler.draw_listed(ids, logits[ids], logits[ids[-1]], params, u)
        assert token_id == sampler.draw_fast(logits, params, u) == sample(logits, params, [], [], END_OF_TEXT, seed, 0)
        drawn.add(token_id)
    assert len(drawn) > 1
    alone = SamplingParams(**further)
    assert sampler.draw_listed(ids, logits[ids], logits[ids[-1]], alone, 0.5) is None
    assert sampler.draw_fast(logits, alone, 0.5) is not None


@pytest.mark.parametrize("candidates", [4, 256])
@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.9999999])
def test_a_nucleus_wider_than_the_candidates_is_found_too(
    candidates: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Equally likely tokens but for a trifle: a nucleus of 95 % holds hundreds of them.
    logits = np.linspace(0, 1e-3, VOCABULARY, dtype=np.float32)
    logits[:100] -= 12
    monkeypatch.setattr(sampler, "NUCLEUS_CANDIDATES", candidates)
    for seed in range(50):
        params = SamplingParams(top_p=top_p, min_p=0.001 * (seed % 2), seed=seed)
        assert sampler.draw_fast(logits, params, 0.5) is not None
        assert draw(continued(params, [], []), logits) == sample(logits, params, [], [], END_OF_TEXT, seed, 0)


def test_few_candidates_are_looked_at() -> None:
    logits = np.tile(make_logits(0, 3.0, 2**16), 80)
    logits = logits + np.linspace(0, 1e-3, logits.size, dtype=np.float32)
    peaks = logits.reshape(sampler.PART, -1).max(axis=0)
    ids = sampler._candidates(logits, peaks, peaks.max(), 50)
    assert 50 <= len(ids) < 2000
    assert set(np.argsort(logits)[-50:]) <= set(ids)
    assert (np.diff(ids) > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_the_models_fault(bad: float) -> None:
    logits = make_logits(0, 1.0, 16)
    logits[5] = bad
    with pytest.raises(ArithmeticError, match="logits hold"):
        draw(continued(SamplingParams(seed=1), [], []), logits)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, seed=0),
        SamplingParams(temperature=1.2, top_k=12, seed=0),
        SamplingParams(top_k=30, top_p=0.8, repetition_penalty=1.3, seed=0),
        SamplingParams(top_p=0.9, presence_penalty=0.5, frequency_penalty=0.2, seed=0),
        SamplingParams(temperature=1.5, min_p=0.1, no_repeat_ngram_size=2, seed=0),
        SamplingParams(typical_p=0.7, seed=0),
        SamplingParams(temperature=1.5, top_n_sigma=1.2, seed=0),
        SamplingParams(top_k=200, eta_cutoff=0.01, seed=0),
    ],
)
def test_frequencies_are_those_of_the_filtered_distribution(params: SamplingParams) -> None:
    """Chi-squared over draws that differ only in the seed; the bound is passed by chance once in more than 10**6."""
    logits = make_logits(1, 2.5, 2**16)
    prompt, output, draws = [1, 2, 3], [1, 4, 1], 20_000
    expected = softmax(filter_logits(logits, params, prompt, output, END_OF_TEXT)) * draws
    counts = np.zeros(VOCABULARY)
    continuation = continued(params, prompt, output)
    for choice in range(draws):
        continuation._choice, continuation._uniforms = choice, np.zeros(0)
        counts[draw(continuation, logits)] += 1
    assert counts[expected == 0].sum() == 0
    # Tokens too rare for the approximation count as one.
    common = expected >= 8
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic, freedom = float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 12


def test_choices_draw_different_numbers_and_a_step_does_not_depend_on_the_last() -> None:
    params = SamplingParams(seed=5)
    logits = make_logits(2, 0.1, 2**16)
    first, second = (continued(params, [], [], choice) for choice in (0, 1))
    assert [draw(first, logits), draw(second, logits)] == [
        sample(logits, params, [], [], END_OF_TEXT, 5, choice) for choice in (0, 1)
    ]
    later = continued(params, [], [7] * 200)
    assert draw(later, logits) == sample(logits, params, [], [7] * 200, END_OF_TEXT, 5, 0)


def test_memory_of_what_was_said_grows_with_it() -> None:
    params = SamplingParams(repetition_penalty=1.5, seed=0, temperature=0)
    logits = np.zeros(VOCABULARY, np.float32)
    logits[: VOCABULARY - 1] = 1
    continuation = continued(params, [], list(range(VOCABULARY - 1)))
    assert draw(continuation, logits) == sample(logits, params, [], list(range(VOCABULARY - 1)), END_OF_TEXT, 0, 0)
