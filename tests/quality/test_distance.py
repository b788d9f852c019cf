"""The distance of samples from people's texts."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.quality.distance import (
    BETTER_ABOVE,
    FAULTS,
    KINDS_OF_INVENTED_WORDS,
    TAME_ABOVE,
    TAME_BELOW,
    TERMS,
    SetFigures,
    Weights,
    distance,
    human_scales,
)
from pipeline.quality.diversity import distinct_n
from pipeline.quality.jackknife import leave_each_out
from pipeline.quality.repetition import rep_n
from pipeline.quality.self_bleu import self_bleu
from pipeline.quality.zipf import zipf_coefficient

same_examples = settings(derandomize=True, deadline=None)

HUMAN = SetFigures(
    rep_2=0.12,
    rep_3=0.03,
    rep_4=0.01,
    distinct_1=0.16,
    distinct_2=0.63,
    distinct_3=0.87,
    zipf=0.9,
    self_bleu=0.3,
    perplexity=60.0,
    mean_tokens=360.0,
    invented_words=9.0,
    lone_names=4.0,
    joined_words=0.5,
    doubled_words=0.1,
    broken_quotes=0.03,
    broken_sentences=0.05,
    empty_share=0.01,
    mean_copy_tokens=13.0,
    looping_share=0.02,
    form_share=0.8,
)
INFORMING = ("rep_3", "distinct_1", "distinct_3", "zipf", "mauve")
"""The figures that are neither faults nor terms."""
SCALES = dict.fromkeys((*TERMS, *FAULTS), 0.1)
EVERY_WEIGHT = Weights(**dict.fromkeys(TERMS, 1.0))

each_term = pytest.mark.parametrize("term", TERMS)
each_compared = pytest.mark.parametrize("term", TERMS)


def moved(term: str, factor: float) -> SetFigures:
    return replace(HUMAN, **{term: factor * getattr(HUMAN, term)})


def test_people_are_at_no_distance_from_themselves() -> None:
    assert distance(HUMAN, HUMAN, SCALES).total == 0


def test_scores_and_weights_have_the_same_terms() -> None:
    assert set(asdict(HUMAN)) == {*TERMS, *FAULTS, *KINDS_OF_INVENTED_WORDS, *INFORMING}


def test_distance_by_hand() -> None:
    own = replace(
        HUMAN,
        rep_2=0.18,
        distinct_2=0.58,
        perplexity=60 / math.e,
        mean_tokens=720.0,
    )
    scales = SCALES | {"rep_2": 0.02, "perplexity": 0.5}
    total, terms, *_ = distance(own, HUMAN, scales, replace(EVERY_WEIGHT, rep_2=2.0))
    expected = {
        "rep_2": 2 * 3,
        "distinct_2": 0.5,
        "perplexity": 2,
        "mean_tokens": math.log(2) / 0.1,
    }
    assert terms == pytest.approx(dict.fromkeys(TERMS, 0) | expected)
    assert total == pytest.approx(sum(expected.values()))


each_too_much = pytest.mark.parametrize("term", TERMS)


@each_too_much
def test_more_of_a_figure_is_farther_and_moves_its_term_alone(term: str) -> None:
    near, far = (distance(moved(term, factor), HUMAN, SCALES, EVERY_WEIGHT) for factor in (1.05, 1.5))
    assert 0 < near.total < far.total
    assert {name for name, value in far.terms.items() if value > 0} == {term}
    assert far.total == far.terms[term]


@each_compared
def test_less_of_a_figure_is_farther(term: str) -> None:
    near, far = (distance(moved(term, factor), HUMAN, SCALES, EVERY_WEIGHT).total for factor in (0.95, 0.5))
    assert 0 < near < far


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_counts_only_above_its_allowance(name: str) -> None:
    place = math.log1p(HUMAN.mean_copy_tokens) if name == "mean_copy_tokens" else getattr(HUMAN, name)
    worse = -1 if name in BETTER_ABOVE else 1

    def excess(steps: float) -> float:
        moved_to = place + worse * steps * 0.1
        value = math.expm1(moved_to) if name == "mean_copy_tokens" else moved_to
        found = distance(replace(HUMAN, **{name: value}), HUMAN, SCALES)
        assert found.total == 0
        assert found.excess == sum(found.excesses.values()) == found.excesses[name]
        return found.excess

    assert excess(-5) == excess(0) == excess(0.99) == 0
    assert excess(1.5) == pytest.approx(0.5)
    assert excess(4) == pytest.approx(3)


def test_faults_decide_before_nearness() -> None:
    far = distance(moved("perplexity", 9), HUMAN, SCALES)
    faulty = distance(moved("invented_words", 1.2), HUMAN, SCALES)
    assert far.rank < faulty.rank
    assert far.score < faulty.score
    nearer = distance(moved("perplexity", 2), HUMAN, SCALES)
    assert nearer.rank < far.rank
    assert nearer.score < far.score


@pytest.mark.parametrize(
    ("term", "factor", "fault"),
    [
        *((name, 1.5, "too_tame") for name in TAME_ABOVE),
        *((name, 0.5, "too_tame") for name in TAME_BELOW),
        *((name, 0.5, "too_wild") for name in TAME_ABOVE),
        *((name, 1.5, "too_wild") for name in TAME_BELOW),
    ],
)
def test_each_figure_tells_which_way_decoding_errs(term: str, factor: float, fault: str) -> None:
    found = distance(moved(term, factor), HUMAN, SCALES, EVERY_WEIGHT)
    other = {"too_tame": "too_wild", "too_wild": "too_tame"}[fault]
    assert getattr(found, fault) == found.total > 0
    assert getattr(found, other) == 0


def test_length_is_off_for_either_reason() -> None:
    for own in (moved("mean_tokens", 1.5), moved("mean_tokens", 0.5)):
        found = distance(own, HUMAN, SCALES, EVERY_WEIGHT)
        assert found.too_tame == found.too_wild == found.total > 0


def test_twice_and_half_are_as_far() -> None:
    for term in ("perplexity", "mean_tokens"):
        assert distance(moved(term, 2), HUMAN, SCALES).total == pytest.approx(
            distance(moved(term, 0.5), HUMAN, SCALES).total
        )


@each_too_much
def test_weight_and_scale_of_a_term(term: str) -> None:
    own = moved(term, 1.5)
    one = distance(own, HUMAN, SCALES, EVERY_WEIGHT).total
    assert distance(own, HUMAN, SCALES, replace(EVERY_WEIGHT, **{term: 3.0})).total == pytest.approx(3 * one)
    assert distance(own, HUMAN, SCALES | {term: 0.2}, EVERY_WEIGHT).total == pytest.approx(one / 2)
    assert distance(own, HUMAN, SCALES, replace(EVERY_WEIGHT, **{term: 0.0})).total == 0


@same_examples
@given(st.lists(st.floats(0.01, 100), min_size=len(TERMS), max_size=len(TERMS)))
def test_total_is_the_sum_of_the_terms_and_never_below_0(values: list[float]) -> None:
    own = replace(HUMAN, **dict(zip(TERMS, values, strict=True)))
    total, terms, too_tame, too_wild, *_ = distance(own, HUMAN, SCALES)
    assert set(terms) == set(TERMS)
    assert total == pytest.approx(sum(terms.values()))
    assert min(terms.values()) >= 0
    assert max(too_tame, too_wild) <= total * (1 + 1e-9)


@each_term
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figure_that_is_no_number_is_an_error_naming_the_term(term: str, value: float) -> None:
    broken = replace(HUMAN, **{term: value})
    with pytest.raises(UserError, match=f"^distance: {term} of the own samples is {value}, must be a finite number$"):
        distance(broken, HUMAN, SCALES)
    with pytest.raises(UserError, match=f"^distance: {term} of the human samples"):
        distance(HUMAN, broken, SCALES)


def test_no_perplexity_is_an_error_naming_the_term() -> None:
    with pytest.raises(UserError, match=r"^distance: perplexity of the own samples is 0\.0, must be above 0"):
        distance(moved("perplexity", 0), HUMAN, SCALES)


def test_samples_without_a_token_are_the_worst() -> None:
    empty = distance(moved("mean_tokens", 0), HUMAN, SCALES)
    faulty = replace(HUMAN, **dict.fromkeys(("invented_words", "doubled_words", "mean_copy_tokens"), 1000.0))
    faulty = replace(faulty, broken_quotes=1.0, broken_sentences=200.0, rep_4=1.0, looping_share=1.0, form_share=0.0)
    least = {name: allowance or 1 / 50 for name, allowance in FAULTS.items()}
    assert empty.rank > distance(faulty, HUMAN, SCALES | least).rank
    assert math.isfinite(empty.score)
    assert empty.terms["mean_tokens"] == pytest.approx(0.5 * math.log(HUMAN.mean_tokens / 0.01) / SCALES["mean_tokens"])


@pytest.mark.parametrize("scale", [0.0, math.nan, -1.0])
def test_scale_that_is_none_is_an_error_naming_the_term(scale: float) -> None:
    with pytest.raises(UserError, match=f"^distance: the scale of self_bleu is {scale}, must be a number above 0$"):
        distance(HUMAN, HUMAN, SCALES | {"self_bleu": scale})
    with pytest.raises(UserError, match="the scale of perplexity is nan"):
        distance(HUMAN, HUMAN, {name: 0.1 for name in TERMS if name != "perplexity"})


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weight_out_of_range_is_an_error_naming_the_term(weight: float) -> None:
    with pytest.raises(UserError, match=f"^weight of rep_2: {weight} is out of range"):
        Weights(rep_2=weight)


def test_the_allowance_of_a_fault_is_what_chance_makes_of_peoples() -> None:
    rates = np.random.default_rng(3).uniform(0, 40, 9)

    def scores(rows: Sequence[int]) -> SetFigures:
        return replace(HUMAN, invented_words=float(rates[list(rows)].mean()))

    scales = human_scales(scores(range(9)), leave_each_out(range(9), scores))
    # Student's t with 8 degrees of freedom.
    assert scales["invented_words"] == pytest.approx(2.306 * rates.std(ddof=1) / 3, rel=1e-3)


def scales_of_moving(shares: NDArray[np.float64], losses: NDArray[np.float64]) -> dict[str, float]:
    """Scales of texts that differ in a share and in their loss alone."""

    def scores(rows: Sequence[int]) -> SetFigures:
        return replace(HUMAN, rep_2=float(shares[list(rows)].mean()), perplexity=math.exp(losses[list(rows)].mean()))

    return human_scales(scores(range(len(shares))), leave_each_out(range(len(shares)), scores))


def test_scale_is_the_standard_error_where_figures_of_people_move() -> None:
    rng = np.random.default_rng(8)
    shares, losses = rng.uniform(0, 1, 9), rng.normal(4, 3, 9)
    scales = scales_of_moving(shares, losses)
    assert scales["rep_2"] == pytest.approx(shares.std(ddof=1) / 3)
    assert scales["perplexity"] == pytest.approx(losses.std(ddof=1) / 3)


def test_scale_is_a_tenth_of_the_peoples_figure_where_it_does_not() -> None:
    scales = scales_of_moving(np.full(9, 0.2), np.full(9, 4.0))
    assert set(scales) == {*TERMS, *FAULTS}
    assert scales["rep_2"] == pytest.approx(0.02)
    assert scales["self_bleu"] == pytest.approx(HUMAN.self_bleu / 10)
    assert scales["perplexity"] == scales["mean_tokens"] == pytest.approx(0.1)
    assert scales["looping_share"] == scales["form_share"] == pytest.approx(1 / 9)
    assert scales["invented_words"] == 1.0


def test_other_texts_of_the_same_people_are_near() -> None:
    rng = np.random.default_rng(9)
    texts = [rng.zipf(1.3, size=size).clip(max=2000).tolist() for size in rng.integers(100, 150, 40)]

    def scores(own: list[list[int]]) -> SetFigures:
        return replace(
            HUMAN,
            **{f"rep_{n}": fmean(rep_n(text, n) for text in own) for n in (2, 3, 4)},
            **{f"distinct_{n}": distinct_n(own, n) for n in (1, 2, 3)},
            zipf=zipf_coefficient(own),
            self_bleu=self_bleu(own, 4),
            mean_tokens=float(np.mean([len(text) for text in own])),
        )

    some, others = texts[:20], texts[20:]
    found = distance(scores(some), scores(others), human_scales(scores(others), leave_each_out(others, scores)))
    assert 0 < found.total < sum(asdict(Weights()).values())


def test_scales_of_one_text_or_of_what_is_no_number_are_errors() -> None:
    with pytest.raises(UserError, match="two samples at least, there are 1"):
        human_scales(HUMAN, [HUMAN])
    with pytest.raises(UserError, match="two samples at least, there are 0"):
        human_scales(HUMAN, [])
    with pytest.raises(UserError, match="self_bleu of the human samples is nan"):
        human_scales(HUMAN, [HUMAN, replace(HUMAN, self_bleu=math.nan)])
