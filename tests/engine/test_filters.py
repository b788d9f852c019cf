"""Sampling: hand-solved distributions, `transformers`' own processors, ties, extremes, and the drawing of tokens."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pipeline.decoding import SamplingParams
from pipeline.engine.filters import (
    Logits,
    apply_bans,
    apply_bias,
    apply_eta_cutoff,
    apply_min_p,
    apply_minimum_length,
    apply_no_repeat_ngram,
    apply_output_penalties,
    apply_repetition_penalty,
    apply_temperature,
    apply_top_k,
    apply_top_n_sigma,
    apply_top_p,
    apply_typical_p,
    check_token_ids,
    draw,
    filter_logits,
    log_normalizers,
    log_softmax,
    place_in,
    sample,
    softmax,
    token_logprobs,
    uniform,
)
from pipeline.errors import UserError

INF = math.inf
LARGEST_UNIFORM = 1 - 2.0**-53

# The same examples on every run. Logits are distinct multiples of 1/64: nothing ties, so `transformers`, which breaks
# ties by sorting order, must agree to the token. It is given float64, to keep its own rounding out of the comparison.
same_examples = settings(derandomize=True, deadline=None)
distinct_logits = st.lists(st.integers(-1024, 1024), min_size=8, max_size=64, unique=True).map(
    lambda numerators: np.array(numerators, dtype=np.float32) / np.float32(64)
)
shares = st.floats(0.01, 0.99)
histories = st.lists(st.integers(0, 7), max_size=12)


def row(*values: float) -> Logits:
    return np.array(values, dtype=np.float32)


def logits_of(*probabilities: float) -> Logits:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities, dtype=np.float32))


def processed(processors: Sequence[LogitsProcessor], logits: Logits, token_ids: Sequence[int] = ()) -> NDArray[Any]:
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    chain = LogitsProcessorList(processors)
    return np.asarray(chain(torch.tensor([list(token_ids)], dtype=torch.int64), scores)[0].numpy())


# By hand, and against transformers


def test_bias_is_added() -> None:
    np.testing.assert_array_equal(apply_bias(row(1, 2, -INF), {0: 2.5, 2: 9}), row(3.5, 2, -INF))


def test_banned_token_is_removed() -> None:
    np.testing.assert_array_equal(apply_bans(row(1, 2, 3), (1,), (), (2,)), row(1, -INF, 3))


def test_allowed_tokens_leave_only_themselves_and_the_ends() -> None:
    np.testing.assert_array_equal(apply_bans(row(1, 2, 3, 4), (), (0,), (3,)), row(1, -INF, -INF, 4))


def test_ban_holds_for_allowed_tokens_and_ends() -> None:
    np.testing.assert_array_equal(apply_bans(row(1, 2, 3, 4), (1, 3), (0, 1), (3,)), row(1, -INF, -INF, -INF))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    np.testing.assert_array_equal(
        apply_repetition_penalty(row(4, -4, 0, 4, -INF), [0, 1, 1, 2, 4], 2), row(2, -8, 0, 4, -INF)
    )


@same_examples
@given(distinct_logits, histories, st.floats(0.1, 10))
def test_repetition_penalty_against_transformers(logits: Logits, ids: list[int], penalty: float) -> None:
    expected = processed([RepetitionPenaltyLogitsProcessor(penalty)], logits, ids)
    np.testing.assert_allclose(apply_repetition_penalty(logits, ids, penalty), expected, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_extreme_repetition_penalty_gives_no_infinite_or_undefined_logit(penalty: float) -> None:
    penalized = apply_repetition_penalty(row(500, -500, 0), [0, 1, 2], penalty)
    assert not np.isnan(penalized).any()
    assert penalized.max() < INF


def test_presence_and_frequency_penalties_follow_openai() -> None:
    # logit - count * frequency_penalty - (count > 0) * presence_penalty
    logits = row(3, 2, 1, 0)
    output = [0, 0, 0, 1]
    np.testing.assert_allclose(apply_output_penalties(logits, output, 0.5, 0), row(2.5, 1.5, 1, 0))
    np.testing.assert_allclose(apply_output_penalties(logits, output, 0, 0.25), row(2.25, 1.75, 1, 0))
    both = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    np.testing.assert_allclose(filter_logits(logits, both, [2, 2], output, 3), row(0, -0.5, -0.75, -1.75))


def test_negative_penalties_favour_what_was_said() -> None:
    np.testing.assert_allclose(apply_output_penalties(row(1, 1), [1, 1], -2, 0), row(1, 3))
    np.testing.assert_allclose(apply_output_penalties(row(1, 1), [1, 1], 0, -2), row(1, 5))


@pytest.mark.parametrize(
    ("token_ids", "ngram_size", "removed"),
    [
        ([0, 1, 2, 0, 1], 3, {2}),
        ([0, 1, 2, 0, 1, 3, 0, 1], 3, {2, 3}),
        ([0, 1, 2], 3, set()),
        ([0, 1], 3, set()),
        ([0, 1], 10**9, set()),
        ([0, 0], 2, {0}),
        ([2, 1], 1, {1, 2}),
        ([], 1, set()),
    ],
)
def test_token_that_completes_a_known_ngram_is_removed(
    token_ids: list[int], ngram_size: int, removed: set[int]
) -> None:
    filtered = apply_no_repeat_ngram(row(1, 1, 1, 1), token_ids, ngram_size)
    assert set(np.flatnonzero(np.isneginf(filtered))) == removed


@same_examples
@given(distinct_logits, st.lists(st.integers(0, 2), max_size=20), st.integers(1, 4))
def test_no_repeat_ngram_against_transformers(logits: Logits, ids: list[int], size: int) -> None:
    expected = processed([NoRepeatNGramLogitsProcessor(size)], logits, ids)
    np.testing.assert_array_equal(apply_no_repeat_ngram(logits, ids, size), expected)


@pytest.mark.parametrize(("output_tokens", "ends_removed"), [(0, True), (2, True), (3, False), (4, False)])
def test_ends_are_removed_before_the_minimum_length(output_tokens: int, ends_removed: bool) -> None:
    logits = row(1, 2, 3, 4)
    filtered = apply_minimum_length(logits, output_tokens, 3, (1, 3))
    np.testing.assert_array_equal(filtered, row(1, -INF, 3, -INF) if ends_removed else logits)
    reference = MinNewTokensLengthLogitsProcessor(2, 3, [1, 3])
    np.testing.assert_array_equal(filtered, processed([reference], logits, [0] * (2 + output_tokens)))


def test_temperature_divides() -> None:
    np.testing.assert_allclose(softmax(apply_temperature(logits_of(0.8, 0.2), 0.5)), [16 / 17, 1 / 17], rtol=1e-6)


@same_examples
@given(distinct_logits, st.floats(1e-4, 100))
def test_temperature_against_transformers(logits: Logits, temperature: float) -> None:
    expected = torch.tensor(processed([TemperatureLogitsWarper(temperature)], logits)).softmax(0).numpy()
    np.testing.assert_allclose(softmax(apply_temperature(logits, temperature)), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("temperature", [1e-4, 1e-300])
def test_tiny_temperature_is_the_argmax(temperature: float) -> None:
    np.testing.assert_array_equal(softmax(apply_temperature(row(3e38, 500, -500, -INF), temperature)), [1, 0, 0, 0])


@pytest.mark.parametrize("temperature", [1e9, 1e39, 1e308])
def test_huge_temperature_is_nearly_uniform(temperature: float) -> None:
    np.testing.assert_allclose(
        softmax(apply_temperature(row(3, -3, 0, -INF), temperature)), [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-5
    )


def test_temperature_0_keeps_the_lowest_id_of_the_likeliest() -> None:
    np.testing.assert_array_equal(apply_temperature(row(1, 7, 7, 0), 0), row(-INF, 7, -INF, -INF))


def test_top_k_by_hand() -> None:
    np.testing.assert_array_equal(apply_top_k(row(1, 4, 3, 2), 2), row(-INF, 4, 3, -INF))


def test_top_k_keeps_ties_with_the_last() -> None:
    np.testing.assert_array_equal(apply_top_k(row(2, 4, 2, 1), 2), row(2, 4, 2, -INF))


@pytest.mark.parametrize("top_k", [0, 3, 4])
def test_top_k_of_the_whole_vocabulary_or_more_removes_nothing(top_k: int) -> None:
    np.testing.assert_array_equal(apply_top_k(row(1, 2, 3), top_k), row(1, 2, 3))


def test_top_k_above_what_is_left_removes_nothing() -> None:
    np.testing.assert_array_equal(apply_top_k(row(1, -INF, 3), 2), row(1, -INF, 3))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.45, {0}), (0.55, {0, 1}), (0.75, {0, 1}), (0.85, {0, 1, 2}), (0.96, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    filtered = apply_top_p(logits_of(0.5, 0.3, 0.15, 0.05), top_p)
    assert set(np.flatnonzero(np.isfinite(filtered))) == kept


def test_top_p_leaves_the_proportions_of_what_it_keeps() -> None:
    np.testing.assert_allclose(softmax(apply_top_p(logits_of(0.5, 0.4, 0.1, 0), 0.6)), [5 / 9, 4 / 9, 0, 0], rtol=1e-6)


def test_top_p_keeps_ties_at_the_edge() -> None:
    np.testing.assert_array_equal(apply_top_p(logits_of(0.2, 0.5, 0.2, 0.1), 0.6), logits_of(0.2, 0.5, 0.2, 0))


@pytest.mark.parametrize("apply", [apply_top_p, apply_typical_p, apply_top_n_sigma, apply_eta_cutoff])
@pytest.mark.parametrize("share", [5e-324, 1e-17, 0.5, LARGEST_UNIFORM])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 50_257])
def test_all_of_a_uniform_distribution_is_tied(
    apply: Callable[[Logits, float], Logits], share: float, size: int
) -> None:
    logits = np.full(size, 3, dtype=np.float32)
    np.testing.assert_array_equal(apply(logits, share), logits)


def test_tiny_top_p_keeps_the_likeliest() -> None:
    np.testing.assert_array_equal(apply_top_p(row(1, 2, 3), 1e-300), row(-INF, -INF, 3))


@pytest.mark.parametrize(("min_p", "kept"), [(0.05, {0, 1, 2}), (0.3, {0, 1}), (0.7, {0}), (1.0, {0})])
def test_min_p_is_a_share_of_the_likeliest(min_p: float, kept: set[int]) -> None:
    filtered = apply_min_p(logits_of(0.5, 0.3, 0.1, 0.02), min_p)
    assert set(np.flatnonzero(np.isfinite(filtered))) == kept


def test_min_p_1_keeps_ties_with_the_likeliest() -> None:
    np.testing.assert_array_equal(apply_min_p(row(7.3, 7.3, 7.2), 1), row(7.3, 7.3, -INF))


def test_typical_p_prefers_the_surprise_nearest_the_entropy() -> None:
    # Entropy 1.21 nats; surprises 0.69, 1.39, 2.08, 2.08: the nearest is token 1, then 0, then 2 and 3 alike.
    logits = logits_of(0.5, 0.25, 0.125, 0.125)
    np.testing.assert_array_equal(apply_typical_p(logits, 0.2), row(-INF, logits[1], -INF, -INF))
    np.testing.assert_array_equal(apply_typical_p(logits, 0.7), row(logits[0], logits[1], -INF, -INF))
    np.testing.assert_array_equal(apply_typical_p(logits, 0.8), logits)


def test_typical_p_takes_a_probability_of_0_by_underflow() -> None:
    np.testing.assert_array_equal(apply_typical_p(row(0, -5000, -INF), 0.9), row(0, -INF, -INF))


@pytest.mark.parametrize(("top_n_sigma", "kept"), [(0.5, {0}), (1.0, {0, 1}), (2.0, {0, 1, 2}), (3.0, {0, 1, 2, 3})])
@pytest.mark.parametrize("removed", [0, 5])
def test_top_n_sigma_counts_deviations_of_what_is_left(top_n_sigma: float, kept: set[int], removed: int) -> None:
    # The mean is 0 and the deviation sqrt(5), 2.24: edges at 1.88, 0.76, -1.47 and -3.71.
    filtered = apply_top_n_sigma(row(3, 1, -1, -3, *[-INF] * removed), top_n_sigma)
    assert set(np.flatnonzero(np.isfinite(filtered))) == kept


@pytest.mark.parametrize(("top_n_sigma", "kept"), [(1.99, {0, 2}), (2.0, {0, 1, 2, 3})])
def test_top_n_sigma_keeps_ties_at_the_edge(top_n_sigma: float, kept: set[int]) -> None:
    filtered = apply_top_n_sigma(row(0.7, 0.1, 0.7, 0.1), top_n_sigma)
    assert set(np.flatnonzero(np.isfinite(filtered))) == kept


def test_top_n_sigma_keeps_the_same_at_any_temperature() -> None:
    logits = np.random.default_rng(3).normal(size=200).astype(np.float32)
    kept = np.isfinite(apply_top_n_sigma(logits, 1.5))
    assert 1 < kept.sum() < 100
    for temperature in (0.1, 0.7, 3.0, 50.0):
        found = apply_top_n_sigma(apply_temperature(logits, temperature), 1.5)
        np.testing.assert_array_equal(np.isfinite(found), kept)


@same_examples
@given(distinct_logits, st.floats(0.01, 5), st.integers(0, 6))
def test_top_n_sigma_against_its_formula(logits: Logits, top_n_sigma: float, removed: int) -> None:
    left = logits[removed:].astype(np.float64)
    edge = left.max() - top_n_sigma * np.sqrt(np.mean((left - left.mean()) ** 2))
    logits[:removed] = -INF
    np.testing.assert_array_equal(apply_top_n_sigma(logits, top_n_sigma), np.where(logits >= edge, logits, -INF))


@pytest.mark.parametrize(
    ("probabilities", "eta_cutoff", "kept"),
    [
        # Entropy 1.21 nats, so exp(-entropy) is 0.297: the cutoffs are 0.094, 0.163 and 0.266.
        ((0.5, 0.25, 0.125, 0.125), 0.1, {0, 1, 2, 3}),
        ((0.5, 0.25, 0.125, 0.125), 0.3, {0, 1}),
        ((0.5, 0.25, 0.125, 0.125), 0.8, {0}),
        # Entropy 0.39 nats: sqrt(0.05) * 0.675 is 0.151, so the cutoff is the value itself.
        ((0.9, 0.06, 0.04), 0.05, {0, 1}),
    ],
)
def test_eta_lowers_its_cutoff_as_entropy_grows(
    probabilities: tuple[float, ...], eta_cutoff: float, kept: set[int]
) -> None:
    filtered = apply_eta_cutoff(logits_of(*probabilities, 0), eta_cutoff)
    assert set(np.flatnonzero(np.isfinite(filtered))) == kept


@pytest.mark.parametrize("apply", [apply_top_n_sigma, apply_eta_cutoff])
@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32) | st.just(-INF) | st.just(1.5), min_size=1, max_size=50),
    st.floats(0, LARGEST_UNIFORM),
)
def test_the_likeliest_is_kept_and_whatever_is_as_likely_as_a_token_kept(
    apply: Callable[[Logits, float], Logits], values: list[float], strength: float
) -> None:
    logits = row(0, *values)
    filtered = apply(logits, strength)
    kept = np.isfinite(filtered)
    assert kept[logits == logits.max()].all()
    np.testing.assert_array_equal(filtered, np.where(logits >= logits[kept].min(), logits, -INF))


@pytest.mark.parametrize("apply", [apply_top_n_sigma, apply_eta_cutoff])
@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32) | st.just(-INF), min_size=1, max_size=50))
def test_a_value_of_0_removes_nothing(apply: Callable[[Logits, float], Logits], values: list[float]) -> None:
    np.testing.assert_array_equal(apply(row(*values), 0), row(*values))


def test_an_enormous_top_n_sigma_removes_nothing() -> None:
    logits = row(3e38, 0, -3e38, -INF)
    np.testing.assert_array_equal(apply_top_n_sigma(logits, 1.7e308), logits)


def test_eta_takes_a_probability_of_0_by_underflow() -> None:
    np.testing.assert_array_equal(apply_eta_cutoff(row(0, -5000, -INF), 5e-324), row(0, -INF, -INF))


class TopNSigmaLogitsWarper(LogitsProcessor):
    """Top-n-sigma in PyTorch, which `transformers` lacks."""

    def __init__(self, top_n_sigma: float) -> None:
        self.top_n_sigma = top_n_sigma

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        deviation = scores[scores.isfinite()].std(correction=0)
        return scores.masked_fill(scores < scores.max() - self.top_n_sigma * deviation, -INF)


WARPERS: list[tuple[Callable[[Logits, float], Logits], Callable[[float], LogitsProcessor]]] = [
    (apply_top_p, TopPLogitsWarper),
    (apply_min_p, MinPLogitsWarper),
    (apply_typical_p, TypicalLogitsWarper),
    (apply_eta_cutoff, EtaLogitsWarper),
]


@pytest.mark.parametrize(("apply", "warper"), WARPERS)
@same_examples
@given(logits=distinct_logits, share=shares, removed=st.integers(0, 6))
def test_warper_against_transformers(
    apply: Callable[[Logits, float], Logits],
    warper: Callable[[float], LogitsProcessor],
    logits: Logits,
    share: float,
    removed: int,
) -> None:
    logits[:removed] = -INF
    np.testing.assert_array_equal(apply(logits, share), processed([warper(share)], logits))


@same_examples
@given(distinct_logits, st.integers(1, 80))
def test_top_k_against_transformers(logits: Logits, top_k: int) -> None:
    np.testing.assert_array_equal(apply_top_k(logits, top_k), processed([TopKLogitsWarper(top_k)], logits))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_one_token_left_stays(share: float) -> None:
    logits = row(-INF, -80, -INF)
    for filtered in (
        apply_top_k(logits, 1),
        apply_top_p(logits, share),
        apply_min_p(logits, share),
        apply_typical_p(logits, share),
        apply_top_n_sigma(logits, share),
        apply_eta_cutoff(logits, share),
    ):
        np.testing.assert_array_equal(filtered, logits)
    assert draw(logits, share) == 1


# The chain

END_OF_TEXT = 7

chains = st.fixed_dictionaries(
    {
        # Factors and biases that let no two multiples of 1/64 tie.
        "logit_bias": st.sampled_from([{}, {0: 2.4517}, {1: -3.1379, 4: 2.4517}]),
        "banned_token_ids": st.sampled_from([(), (3,), (2, 3)]),
        "repetition_penalty": st.sampled_from([1.0, 0.8713, 1.1379]),
        "no_repeat_ngram_size": st.integers(0, 3),
        "min_new_tokens": st.integers(0, 8),
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 1.3, 5.0]),
        "top_k": st.integers(0, 70),
        "top_p": shares | st.just(1.0),
        "min_p": shares | st.just(0.0),
        "typical_p": shares | st.just(1.0),
        "top_n_sigma": st.sampled_from([0.0, 0.37, 1.13, 2.71]),
        "eta_cutoff": shares | st.just(0.0),
    }
)


@same_examples
@given(distinct_logits, histories, histories, chains)
def test_chain_against_transformers(
    logits: Logits, prompt: list[int], output: list[int], values: dict[str, Any]
) -> None:
    params = SamplingParams(**values, stop_token_ids=(6,))
    logits = np.append(logits, row(-17, -18))  # tokens that no filter before the warpers removes
    ends = [END_OF_TEXT, 6]
    processors: list[LogitsProcessor] = []
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(i,): bias for i, bias in params.logit_bias.items()}))
    if params.banned_token_ids:
        processors.append(SuppressTokensLogitsProcessor(params.banned_token_ids))
    processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, ends))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        processors.append(TypicalLogitsWarper(params.typical_p))
    if params.top_n_sigma:
        processors.append(TopNSigmaLogitsWarper(params.top_n_sigma))
    if params.eta_cutoff:
        processors.append(EtaLogitsWarper(params.eta_cutoff))

    expected = processed(processors, logits, prompt + output)
    filtered = filter_logits(logits, params, prompt, output, END_OF_TEXT)
    np.testing.assert_array_equal(np.isfinite(filtered), np.isfinite(expected))
    np.testing.assert_allclose(softmax(filtered), torch.tensor(expected).softmax(0).numpy(), rtol=1e-4, atol=1e-12)


def test_neutral_parameters_change_no_probability() -> None:
    logits = row(1, -INF, 3)
    np.testing.assert_array_equal(filter_logits(logits, SamplingParams(), [0, 1], [2, 2], 0), row(-2, -INF, 0))


def test_no_filter_changes_its_input() -> None:
    params = SamplingParams(
        logit_bias={0: 1.0},
        banned_token_ids=(1,),
        allowed_token_ids=(0, 1, 2, 3, 4),
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        no_repeat_ngram_size=2,
        max_verbatim_tokens=1,
        min_new_tokens=9,
        temperature=0.7,
        top_k=3,
        top_p=0.9,
        min_p=0.01,
        typical_p=0.9,
        top_n_sigma=3.0,
        eta_cutoff=0.01,
        stop_token_ids=(6,),
    )
    logits = np.linspace(-3, 3, 8, dtype=np.float32)
    prompt, output = np.array([0, 1, 2]), np.array([3, 0])
    for array in (logits, prompt, output):
        array.setflags(write=False)  # a write would raise
    sample(logits, params, prompt, output, END_OF_TEXT, 1, 0, lambda run: [*run, 4])
    token_logprobs(logits, 3, 2)


def test_penalties_look_where_they_should() -> None:
    logits = row(2, 2, 2, 2)
    repetition = filter_logits(logits, SamplingParams(repetition_penalty=2), [0], [1], 3)
    np.testing.assert_array_equal(repetition, row(-1, -1, 0, 0))
    presence = filter_logits(logits, SamplingParams(presence_penalty=1), [0], [1], 3)
    np.testing.assert_array_equal(presence, row(0, -1, 0, 0))
    ngram = filter_logits(logits, SamplingParams(no_repeat_ngram_size=2), [0, 1, 2], [0], 3)
    np.testing.assert_array_equal(ngram, row(0, -INF, 0, 0))
    text = {(0,): [1, 3], (1,): [2, 3], (1, 0): [1, 2]}
    copy = SamplingParams(max_verbatim_tokens=1)
    found = filter_logits(logits, copy, [0], [1], 3, lambda run: text[tuple(run)])
    np.testing.assert_array_equal(found, row(0, 0, -INF, 0))
    nothing_drawn = filter_logits(logits, copy, [0, 1], [], 3, lambda run: text[tuple(run)])
    np.testing.assert_array_equal(nothing_drawn, row(0, 0, 0, 0))
    stop = SamplingParams(max_verbatim_tokens=2, stop_token_ids=(2,))
    found = filter_logits(logits, stop, [], [0, 1, 0], 3, lambda run: text[tuple(run)])
    np.testing.assert_array_equal(found, row(0, -INF, 0, 0))


def test_ignore_eos_leaves_end_of_text_to_be_drawn() -> None:
    logits = row(1, 2)
    np.testing.assert_array_equal(filter_logits(logits, SamplingParams(ignore_eos=True), [], [], 1), row(-1, 0))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(banned_token_ids=(0, 1, 2)),
        SamplingParams(allowed_token_ids=(0,), banned_token_ids=(0, 2)),
        SamplingParams(no_repeat_ngram_size=1, allowed_token_ids=(0,), min_new_tokens=2),
    ],
)
def test_nothing_left_to_draw_is_an_error(params: SamplingParams) -> None:
    with pytest.raises(UserError, match="leave no token to draw"):
        filter_logits(row(1, 2, 3), params, [], [0], 2)


@pytest.mark.parametrize("value", [math.nan, INF])
def test_logits_that_are_no_numbers_are_no_fault_of_the_user(value: float) -> None:
    with pytest.raises(ArithmeticError, match=f"the model's logits hold {value}"):
        filter_logits(row(1, value, 3), SamplingParams(top_k=1), [], [], 0)


@pytest.mark.parametrize("magnitude", [1e-38, 1.0, 1e4, 3e38])
def test_logits_of_any_magnitude_can_be_drawn_from(magnitude: float) -> None:
    logits = np.array([-1, 1, 0.5, -INF], dtype=np.float32) * np.float32(magnitude)
    params = SamplingParams(
        temperature=0.5, top_k=3, top_p=0.99, min_p=0.01, typical_p=0.99, top_n_sigma=3, eta_cutoff=1e-4
    )
    assert sample(logits, params, [], [], 3, 1, 0) in {0, 1, 2}


# Drawing


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 4), (LARGEST_UNIFORM, 4)])
def test_draw_inverts_the_cdf_in_vocabulary_order(u: float, token: int) -> None:
    assert draw(logits_of(0, 0.5, 0.3, 0, 0.2, 0), u) == token


def test_uniform_on_an_edge_of_the_cdf_belongs_to_the_token_above() -> None:
    assert draw(row(3, 3, 3, 3), 0.5) == 2
    assert draw(row(-1e6, 3), 0.0) == 1  # the first token's probability underflows to 0


@same_examples
@given(distinct_logits, st.integers(1, 7), st.just(0.0) | st.just(LARGEST_UNIFORM) | st.floats(0, 1, exclude_max=True))
def test_removed_token_is_never_drawn(logits: Logits, removed: int, u: float) -> None:
    logits[:removed] = -INF
    logits = np.append(logits, row(-INF, -1e6, -INF))  # the middle one's probability underflows to 0
    token = draw(logits, u)
    cdf = softmax(logits).cumsum()
    assert removed <= token < logits.size - 3
    assert cdf[token - 1] - 1e-12 <= u <= cdf[token] + 1e-12


def test_temperature_0_ignores_the_seed() -> None:
    greedy = SamplingParams(temperature=0, top_k=2, typical_p=0.1, top_n_sigma=3, eta_cutoff=0.1)
    assert {sample(row(1, 3, 3, 2), greedy, [], [], 0, seed, 0) for seed in range(20)} == {1}


def test_drawn_tokens_follow_the_filtered_distribution() -> None:
    logits = np.random.default_rng(5).normal(size=30).astype(np.float32) * 2
    params = SamplingParams(temperature=1.5, top_k=12, top_p=0.98)
    filtered = filter_logits(logits, params, [], [], 0)
    expected = softmax(filtered) * 20_000
    counts = Counter(draw(filtered, uniform(11, 0, step)) for step in range(20_000))
    kept = expected > 0
    observed = np.array([counts[token] for token in range(30)])
    assert observed[~kept].sum() == 0
    assert kept.sum() == 12
    chi_squared = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_squared < 31.26  # 99.9 % of chi-squared with 11 degrees of freedom lie below


# Random numbers


def philox_4x64(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds of Philox4x64 as the paper gives them, in whole numbers."""
    word = 2**64
    x, k = list(counter), list(key)
    for _ in range(10):
        high_0, low_0 = divmod(0xD2E7470EE14C6C93 * x[0], word)
        high_1, low_1 = divmod(0xCA5A826395121157 * x[2], word)
        x = [high_1 ^ x[1] ^ k[0], low_1, high_0 ^ x[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B97F4A7C15) % word, (k[1] + 0xBB67AE8584CAA73B) % word]
    return x


@pytest.mark.parametrize(("seed", "choice", "step"), [(0, 0, 0), (7, 0, 1), (2**63 - 1, 3, 1023)])
def test_uniform_is_philox_as_the_docstring_has_it(seed: int, choice: int, step: int) -> None:
    word = philox_4x64([step + 1, 0, 0, 0], [seed, choice])[0]
    assert uniform(seed, choice, step) == (word >> 11) / 2**53


def test_uniform_depends_on_its_arguments_alone() -> None:
    forwards = [uniform(3, 0, step) for step in range(10)]
    backwards = [(uniform(4, 1, step), uniform(3, 0, step))[1] for step in reversed(range(10))]
    assert forwards == backwards[::-1]


def test_seed_choice_and_step_each_give_other_numbers() -> None:
    numbers = {
        uniform(seed, choice, step) for seed in (0, 1, 2**32, 2**63 - 1) for choice in range(5) for step in range(50)
    }
    assert len(numbers) == 4 * 5 * 50


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_numbers_are_uniform_over_seeds_choices_and_steps(varied: int) -> None:
    arguments = np.full((20_000, 3), 9)
    arguments[:, varied] = np.arange(20_000)
    numbers = np.array([uniform(*map(int, each)) for each in arguments])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 148.2  # 99.9 % of chi-squared with 99 degrees of freedom lie below


def test_a_request_draws_the_same_alone_and_among_others() -> None:
    rows = np.random.default_rng(1).normal(size=(40, 16)).astype(np.float32)
    params = SamplingParams(temperature=1.2, top_p=0.95, repetition_penalty=1.1)

    def continuations(seeds: list[int]) -> dict[int, list[int]]:
        outputs: dict[int, list[int]] = {seed: [] for seed in seeds}
        for logits in rows:
            for seed, output in outputs.items():
                output.append(sample(logits, params, [1, 2], output, 15, seed, 0))
        return outputs

    together = continuations([1, 2, 3])
    assert together == {**continuations([3]), **continuations([1]), **continuations([2])}
    assert len({tuple(output) for output in together.values()}) == 3


# Log-probabilities and token ids


def test_log_softmax_against_torch() -> None:
    logits = np.random.default_rng(2).normal(size=(5, 100)).astype(np.float32) * 20
    expected = torch.tensor(logits, dtype=torch.float64).log_softmax(-1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-12)


def test_softmax_does_not_overflow_with_large_logits() -> None:
    np.testing.assert_array_equal(softmax(row(3e38, 3e38, -3e38, -INF)), [0.5, 0.5, 0, 0])


def test_token_logprobs_are_natural_and_likeliest_first() -> None:
    chosen, likeliest = token_logprobs(logits_of(0.125, 0.5, 0.25, 0.125), 3, 2)
    assert chosen == pytest.approx(math.log(0.125))
    assert list(likeliest) == [1, 2]
    assert list(likeliest.values()) == pytest.approx([math.log(0.5), math.log(0.25)])


def test_token_logprobs_give_ties_by_id_and_never_more_than_asked() -> None:
    assert list(token_logprobs(row(1, 2, 1, 2, 1), 0, 3)[1]) == [1, 3, 0]
    many = np.tile(row(1, 2, 3), 100)
    assert list(token_logprobs(many, 0, 250)[1]) == [*range(2, 300, 3), *range(1, 300, 3), *range(0, 150, 3)]
    assert list(token_logprobs(row(1, 2), 0, 20)[1]) == [1, 0]
    assert token_logprobs(row(1, 2), 0, 0)[1] == {}


@pytest.mark.parametrize("name", ["logit_bias", "banned_token_ids", "allowed_token_ids", "stop_token_ids"])
def test_token_id_outside_the_vocabulary_names_the_field(name: str) -> None:
    def params(token_id: int) -> SamplingParams:
        values: dict[str, Any] = {name: {token_id: 1.0} if name == "logit_bias" else [token_id]}
        return SamplingParams(**values)

    check_token_ids(params(49), 50)
    with pytest.raises(UserError, match=rf"^{name}: no token has the id 50, give ids below the vocabulary size \(50\)"):
        check_token_ids(params(50), 50)


@pytest.mark.parametrize("last", [np.nan, 0.0, np.inf])
def test_weights_without_a_sum_are_an_error_and_no_token(last: float) -> None:
    with pytest.raises(ArithmeticError, match="the weights of the tokens sum to"):
        place_in(np.array([0.0, 0.0, last]), 0.5)


def test_normalizers_are_those_of_float64() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (5, 50_257)).astype(np.float32)
    expected = logits[:, 0] - log_softmax(logits)[:, 0]
    np.testing.assert_allclose(log_normalizers(logits), expected, rtol=0, atol=1e-7)
    assert log_normalizers(logits[0]) == log_normalizers(logits)[0]
