"""Bootstrap intervals and jackknife errors of figures of samples."""

from collections.abc import Callable
from statistics import fmean, median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.quality.diversity import distinct_n
from pipeline.quality.jackknife import (
    Interval,
    bootstrap,
    bootstrap_difference,
    bootstrap_mean,
    drawn,
    jackknife,
    jackknife_difference,
    jackknife_error,
    leave_each_out,
)
from pipeline.quality.self_bleu import self_bleu
from pipeline.quality.zipf import zipf_coefficient

same_examples = settings(derandomize=True, deadline=None)


def test_interval_of_two_samples_by_hand() -> None:
    # A resample of 0 and 1 has the mean 0, 1/2 or 1, with 1/4, 1/2 and 1/4 of the chance.
    assert bootstrap([0.0, 1.0], fmean, seed=1, confidence=0.6) == Interval(0.5, 0, 1)
    assert bootstrap([0.0, 1.0], fmean, seed=1, confidence=0.4) == Interval(0.5, 0.5, 0.5)


def test_ends_are_the_quantiles_of_all_resamples() -> None:
    values = np.random.default_rng(2).exponential(size=30)
    means = np.sort([values[row].mean() for row in drawn(30, 1001, 7)])
    found = bootstrap_mean(values, seed=7, resamples=1001, confidence=0.9)
    assert found == pytest.approx((values.mean(), means[50], means[950]))


def test_mean_of_all_resamples_at_once_is_the_mean_of_each() -> None:
    values = np.random.default_rng(3).normal(size=40)
    assert bootstrap_mean(values, seed=4) == pytest.approx(bootstrap(values.tolist(), fmean, seed=4))


def test_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    intervals = [bootstrap_mean(rng.normal(3, 2, 100), seed=seed, resamples=500, confidence=0.9) for seed in range(400)]
    share = fmean(low <= 3 <= high for _, low, high in intervals)
    # Three standard errors of a share of 0.9 in 400, and the little that 100 samples make it too narrow.
    assert 0.84 < share < 0.945


def test_width_is_that_of_the_normal_interval_where_samples_are_many() -> None:
    values = np.random.default_rng(12).normal(size=4000)
    _, low, high = bootstrap_mean(values, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 4000**0.5, rel=0.06)


def test_same_seed_same_interval() -> None:
    samples = [[1, 2], [2, 3], [4, 4, 4]]
    one, same, other = (
        bootstrap(samples, lambda own: distinct_n(own, 1), seed=seed, resamples=50) for seed in (5, 5, 6)
    )
    assert one == same
    assert one != other
    assert drawn(3, 4, 5).tolist() != drawn(3, 4, 6).tolist()


def test_any_statistic_of_any_samples() -> None:
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    found = bootstrap(texts, lambda own: median(map(len, own)), seed=1)
    assert found.estimate == 3
    assert 1 <= found.low <= 3 <= found.high <= 5


def test_difference_draws_the_same_prompts_for_both() -> None:
    # Prompts differ by hundreds, the systems by 1 on each of them.
    first = [100.0, 300.0, 700.0, 200.0]
    second = [value - 1 for value in first]
    assert bootstrap_difference(first, second, fmean, seed=1) == pytest.approx((1, 1, 1))


def test_difference_of_means_is_the_mean_of_differences() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=25), rng.normal(0.5, size=25)
    found = bootstrap_difference(first.tolist(), second.tolist(), fmean, seed=9)
    assert found == pytest.approx(bootstrap_mean(first - second, seed=9))


@same_examples
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.integers(0, 100))
def test_a_system_does_not_differ_from_itself(values: list[float], seed: int) -> None:
    assert bootstrap_difference(values, values, fmean, seed=seed, resamples=20) == (0, 0, 0)


@pytest.mark.parametrize("values", [[2.5], [2.5, 2.5, 2.5]])
def test_one_sample_or_all_the_same_have_a_point(values: list[float]) -> None:
    point = (2.5, 2.5, 2.5)
    assert bootstrap(values, fmean, seed=1, resamples=10) == point
    assert bootstrap_mean(np.array(values), seed=1, resamples=10) == point


def test_no_sample_is_an_error() -> None:
    with pytest.raises(UserError, match="there is no sample to draw from"):
        bootstrap([], fmean, seed=1)
    with pytest.raises(UserError, match="there is no sample to draw from"):
        bootstrap_mean(np.empty(0), seed=1)
    with pytest.raises(UserError, match="there is no sample to draw from"):
        bootstrap_difference([], [], fmean, seed=1)


def test_pairs_need_a_sample_of_both() -> None:
    with pytest.raises(UserError, match=r"^2 samples stand against 1; pairs need"):
        bootstrap_difference([1.0, 2.0], [1.0], fmean, seed=1)
    with pytest.raises(UserError, match=r"^2 samples stand against 1; pairs need"):
        jackknife_difference([1.0, 2.0], [1.0], fmean)


def test_left_out_by_hand() -> None:
    assert leave_each_out([1, 2, 4], sum) == [6, 5, 3]
    assert leave_each_out([], sum) == []


def test_jackknife_error_of_a_mean_is_the_usual_one() -> None:
    values = np.random.default_rng(6).normal(size=(20, 2))
    without = np.array(leave_each_out(list(values), lambda rows: np.mean(rows, axis=0)))
    np.testing.assert_allclose(jackknife_error(without), values.std(axis=0, ddof=1) / 20**0.5)


def test_jackknife_error_by_hand_and_of_samples_all_the_same() -> None:
    # Means without one of 0, 0 and 3: 1.5, 1.5, 0; they differ from their mean, 1, by 0.5, 0.5 and 1.
    assert jackknife_error(np.array([[1.5, 7.0], [1.5, 7.0], [0.0, 7.0]])) == pytest.approx([1, 0])


def test_one_sample_has_no_jackknife_error() -> None:
    with pytest.raises(UserError, match="a standard error takes two samples at least, there are 1"):
        jackknife_error(np.array([[1.0]]))
    with pytest.raises(UserError, match="a standard error takes two samples at least, there are 0"):
        jackknife([], fmean)


def test_jackknife_interval_of_a_mean_is_students() -> None:
    # By hand: 1, 2, 3 and 6 have the mean 3, the standard deviation sqrt(14 / 3), and t of 3 degrees is 3.1824.
    reach = 3.182446 * (14 / 3 / 4) ** 0.5
    assert jackknife([1.0, 2.0, 3.0, 6.0], fmean) == pytest.approx((3, 3 - reach, 3 + reach))
    assert jackknife([2.5, 2.5, 2.5], fmean) == (2.5, 2.5, 2.5)


def test_jackknife_leaves_a_prompt_out_of_both_systems() -> None:
    first = [100.0, 300.0, 700.0, 200.0]
    assert jackknife_difference(first, [value - 1 for value in first], fmean) == pytest.approx((1, 1, 1))
    assert jackknife_difference(first, first, fmean) == (0, 0, 0)


def texts(count: int, rng: np.random.Generator) -> list[list[int]]:
    return [rng.zipf(1.5, size=60).clip(max=500).tolist() for _ in range(count)]


FIGURES: list[Callable[[list[list[int]]], float]] = [
    lambda own: distinct_n(own, 1),
    lambda own: distinct_n(own, 2),
    lambda own: self_bleu(own, 2),
    zipf_coefficient,
]


@pytest.mark.parametrize("figure", FIGURES)
def test_jackknife_error_of_figures_among_samples_is_their_true_spread(
    figure: Callable[[list[list[int]]], float],
) -> None:
    rng = np.random.default_rng(13)
    sets = [texts(30, rng) for _ in range(60)]
    spread = np.std([figure(own) for own in sets])
    error = fmean(float(jackknife_error(np.array(leave_each_out(own, figure)))) for own in sets[:10])
    assert 0.75 < error / spread < 1.4


def test_bootstrap_of_figures_among_samples_lies_beside_them() -> None:
    # What the module warns of: a sample that is drawn twice resembles itself.
    own = texts(30, np.random.default_rng(13))
    assert bootstrap(own, lambda drawn: distinct_n(drawn, 2), seed=1, resamples=50).high < distinct_n(own, 2)
    assert bootstrap(own, lambda drawn: self_bleu(drawn, 2), seed=1, resamples=50).low > self_bleu(own, 2)
