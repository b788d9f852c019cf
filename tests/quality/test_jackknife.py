"""Jackknife errors and intervals of figures of samples."""

from collections.abc import Callable
from statistics import fmean

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.quality.diversity import distinct_n
from pipeline.quality.jackknife import Interval, jackknife_error, jackknife_interval, leave_each_out
from pipeline.quality.self_bleu import self_bleu
from pipeline.quality.zipf import zipf_coefficient


def interval_of_mean(values: list[float]) -> Interval:
    return jackknife_interval(fmean(values), np.array(leave_each_out(values, fmean)))


def test_leaving_each_out_by_hand() -> None:
    assert leave_each_out([1, 2, 4], sum) == [6, 5, 3]
    assert leave_each_out([], sum) == []


def test_jackknife_error_of_a_mean_is_the_usual_one() -> None:
    values = np.random.default_rng(6).normal(size=(20, 2))
    without = np.array(leave_each_out(list(values), lambda rows: np.mean(rows, axis=0)))
    np.testing.assert_allclose(jackknife_error(without), values.std(axis=0, ddof=1) / 20**0.5)


def test_jackknife_error_by_hand_and_of_samples_all_the_same() -> None:
    # Means without one of 0, 0 and 3: 1.5, 1.5, 0; they differ from their mean, 1, by 0.5, 0.5 and 1.
    assert jackknife_error(np.array([[1.5, 7.0], [1.5, 7.0], [0.0, 7.0]])) == pytest.approx([1, 0])


def test_fewer_than_two_samples_have_no_jackknife_error() -> None:
    with pytest.raises(UserError, match="a standard error takes two samples at least, there are 1"):
        jackknife_error(np.array([[1.0]]))
    with pytest.raises(UserError, match="a standard error takes two samples at least, there are 0"):
        jackknife_interval(0.0, np.array(leave_each_out([], fmean)))


def test_interval_of_a_mean_is_students() -> None:
    # By hand: 1, 2, 3 and 6 have the mean 3, the standard deviation sqrt(14 / 3), and t of 3 degrees is 3.1824.
    reach = 3.182446 * (14 / 3 / 4) ** 0.5
    assert interval_of_mean([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3, 3 - reach, 3 + reach))
    assert interval_of_mean([2.5, 2.5, 2.5]) == (2.5, 2.5, 2.5)


def test_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    intervals = [interval_of_mean(rng.normal(3, 2, 30).tolist()) for _ in range(400)]
    share = fmean(low <= 3 <= high for _, low, high in intervals)
    # Three standard errors of a share of 0.95 in 400.
    assert 0.917 < share < 0.983


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
