import math

import numpy as np
import pytest

from pipeline.advice.range_test import Floats, even_out, has_diverged, rate_well_down, rising_rates, smooth, span_of


def test_every_rate_is_the_one_before_times_the_same_factor() -> None:
    assert rising_rates(1e-6, 1e-1, 6) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


def test_the_average_is_corrected_for_its_beginning() -> None:
    # Half of what came before: 0.5·4 / 0.5; (0.25·4 + 0.5·1) / 0.75; (0.125·4 + 0.25·1 + 0.5·2) / 0.875
    assert smooth([4.0, 1.0, 2.0], span=2) == pytest.approx([4.0, 2.0, 2.0])
    assert smooth([3.0] * 20, span=10) == pytest.approx([3.0] * 20)
    assert smooth([], span=10).tolist() == []


def test_a_text_that_is_harder_for_the_base_too_does_not_show() -> None:
    # The base's mean is 4: what is learned stays, the second text's difficulty is removed.
    assert even_out([3.0, 4.5, 2.0], [3.5, 5.0, 3.5]) == pytest.approx([3.5, 3.5, 2.5])


def test_the_test_is_over_at_twice_the_lowest_smoothed_loss() -> None:
    assert not has_diverged(np.array([4.0]))
    assert not has_diverged(np.array([4.0, 2.0, 4.0]))
    assert has_diverged(np.array([4.0, 2.0, 4.1]))
    assert has_diverged(np.array([2.0, math.nan]))
    assert has_diverged(np.array([2.0, math.inf]))
    # A single high loss is not the end: nine tenths of the average are what came before.
    assert not has_diverged(smooth([2.0] * 50 + [10.0], span=10))
    assert has_diverged(smooth([2.0] * 50 + [10.0] * 4, span=10))


def hollow(rates: Floats, middle: float) -> Floats:
    """A loss that falls from 8 to 4: by half at the middle rate, by three quarters at 3^0.5 times that; above ten
    thousand times the middle it rises."""
    return 8 - 4 / (1 + (middle / rates) ** 2) + (rates / (1e4 * middle)) ** 2


def found(rates: Floats, losses: Floats, span: int = 10) -> float | None:
    return rate_well_down(rates, smooth(losses, span), span)


def test_a_rate_by_hand() -> None:
    # After two steps from 8 on to 4: three quarters of the way is 5.
    assert rate_well_down([1, 2, 3, 4, 5, 6, 7], np.array([9.0, 9.0, 8.0, 6.0, 5.0, 4.0, 7.0]), span=2) == 5.0
    assert rate_well_down([1, 2, 3, 4, 5, 6, 7], np.array([9.0, 9.0, 8.0, 6.0, 4.0, 5.0, 7.0]), span=2) == 5.0


@pytest.mark.parametrize("middle", [1e-5, 1e-4, 1e-3])
def test_the_rate_is_three_quarters_down(middle: float) -> None:
    rates = rising_rates(1e-7, 1e-1, 1000)
    # Over 10 of 1,000 steps the average lags by little.
    assert found(rates, hollow(rates, middle)) == pytest.approx(3**0.5 * middle, rel=0.2)


def test_more_steps_find_the_same_rate() -> None:
    rates = [
        found(rising, hollow(rising, 1e-3), span_of(steps))
        for steps in (50, 100, 200, 1000)
        for rising in [rising_rates(1e-6, 1e-1, steps)]
    ]
    assert rates == pytest.approx([rates[-1]] * 4, rel=0.25)
    assert span_of(1) == 2


def test_noise_moves_the_rate_little() -> None:
    rates = rising_rates(1e-6, 1e-1, 100)
    clean = found(rates, hollow(rates, 1e-3))
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(0, 0.1, len(rates))
        assert found(rates, hollow(rates, 1e-3) + noise) == pytest.approx(clean, rel=0.25)


def test_what_comes_after_the_lowest_does_not_count() -> None:
    rates = rising_rates(1e-6, 1e-1, 100)
    losses = hollow(rates, 1e-4)
    expected = found(rates, losses)
    losses[80:85] += 20
    losses[85:] = 6
    assert found(rates, losses) == expected


def test_the_first_steps_do_not_count() -> None:
    rates = rising_rates(1e-6, 1e-1, 100)
    losses = hollow(rates, 1e-3)
    expected = found(rates, losses)
    losses[0] -= 0.5
    assert found(rates, losses) == pytest.approx(expected, rel=0.15)


def test_a_loss_that_falls_nowhere_suggests_nothing() -> None:
    rates = rising_rates(1e-6, 1e-1, 30)
    assert found(rates, np.linspace(3, 5, 30)) is None
    assert found(rates, np.full(30, 3.0)) is None
    assert found(rates, np.linspace(3, 2.99, 30)) is None
    assert found(rates[:1], np.array([3.0])) is None
    assert found(rates[:0], np.array([])) is None
