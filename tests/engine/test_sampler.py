"""The fast sampler says what the readable reference says, and draws what the filtered distribution promises."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decoding import SamplingParams
from pipeline.engine import sampler
from pipeline.engine.filters import Logits, filter_logits, sample, softmax
from pipeline.engine.sampler import Continuation
from pipeline.errors import UserError

VOCABULARY = 700
END_OF_TEXT = 3
EDGE = 1e-6
"""A uniform this near an edge of the CDF may fall to either side."""

parameters: st.SearchStrategy[SamplingParams] = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 0.8, 1.0, 1.7, 50.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 300, 699, 700, 2000]),
    top_p=st.sampled_from([1.0, 1e-9, 0.3, 0.9, 0.95, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 1.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.5, 5.0, 1e-300, 1e300]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2, 3]),
    max_verbatim_tokens=st.sampled_from([0, 0, 1, 2, 5]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -3.0, 2.5, 100.0]), max_size=3),
    banned_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=3).map(tuple),
    allowed_token_ids=st.sampled_from([(), (), (), (5,), tuple(range(0, 600, 7))]),
    min_new_tokens=st.sampled_from([0, 0, 3, 100]),
    stop_token_ids=st.sampled_from([(), (8, 9)]),
    seed=st.integers(0, 2**63 - 1),
)
histories = st.lists(st.integers(0, 12), max_size=30)


TRAINING_IDS = [0, 1, 2, 4, 5, 0, 1, 2, 8, 9, 0, 0, 0, 1, 12, 11, 10, 9, 8, 7, 6, 5, 4]


def followers(run: list[int]) -> list[int]:
    """What stands after a run in a training text."""
    places = range(len(TRAINING_IDS) - len(run))
    return [TRAINING_IDS[i + len(run)] for i in places if TRAINING_IDS[i : i + len(run)] == run]


def continued(params: SamplingParams, prompt: list[int], output: list[int], choice: int = 0) -> Continuation:
    assert params.seed is not None
    continuation = Continuation(params, params.seed, choice, prompt, END_OF_TEXT, VOCABULARY, followers)
    for token_id in output:
        continuation.append(token_id)
    return continuation


def draw(continuation: Continuation, logits: Logits, listed: int = 20) -> int:
    """The next token, the graph having listed so many."""
    top_ids = np.argsort(-logits, kind="stable")[:listed]
    return continuation.draw(logits, logits[top_ids], top_ids)


def outcome(draw: Callable[[], int]) -> Any:
    try:
        return draw()
    except (UserError, ArithmeticError) as error:
        return type(error)


def make_logits(seed: int, spread: float, steps: int) -> Logits:
    """Random logits; with few steps many are equal."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(VOCABULARY) * spread
    return (np.round(logits * steps) / steps).astype(np.float32)


def near_an_edge(logits: Logits, params: SamplingParams, prompt: list[int], output: list[int]) -> bool:
    """Whether the uniform lies within rounding of an edge, or a filter's own edge does."""
    filtered = filter_logits(logits, params, prompt, output, END_OF_TEXT, followers)
    cdf = np.cumsum(softmax(filtered))
    continuation = continued(params, prompt, output)
    return bool((np.abs(cdf - continuation._uniform()) < EDGE).any())


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
    ],
)
def test_frequencies_are_those_of_the_filtered_distribution(params: SamplingParams) -> None:
    """Chi-squared over draws whose seed alone differs; the bound is passed by chance once in more than 10**6."""
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
