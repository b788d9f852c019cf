import numpy as np
import pytest

from pipeline.advice.learning_curve import EXPONENTS, PowerLaw, can_be_fitted, fit_power_law, spread

TOKENS = [10_000, 20_000, 40_000, 80_000]


def test_a_law_by_hand() -> None:
    # 10,000 to the power of a half is 100, of 40,000 it is 200.
    assert PowerLaw(floor=2.0, scale=100.0, exponent=0.5).loss([10_000, 40_000]) == pytest.approx([3.0, 2.5])


@pytest.mark.parametrize(
    "law",
    [
        PowerLaw(2.5, 20.0, 0.25),
        PowerLaw(0.0, 30.0, 0.15),
        PowerLaw(3.0, 100.0, 0.5),
        PowerLaw(1.0, 8.0, 0.07),
        PowerLaw(3.2, 1e4, 1.0),
    ],
)
@pytest.mark.parametrize("points", [3, 4])
def test_a_known_law_is_found_again(law: PowerLaw, points: int) -> None:
    tokens = TOKENS[:points]
    found = fit_power_law(tokens, law.loss(tokens).tolist())
    assert found.floor == pytest.approx(law.floor, abs=0.02)
    assert found.exponent == pytest.approx(law.exponent, rel=0.02)
    assert found.loss([160_000, 320_000]) == pytest.approx(law.loss([160_000, 320_000]), abs=1e-3)


def test_the_order_of_the_points_does_not_matter() -> None:
    losses = [4.4, 4.0, 3.7, 3.5]
    backwards = fit_power_law(TOKENS[::-1], losses[::-1])
    assert backwards.loss(TOKENS) == pytest.approx(fit_power_law(TOKENS, losses).loss(TOKENS), abs=1e-6)


def test_a_flat_curve_gives_its_mean() -> None:
    assert fit_power_law(TOKENS, [3.0] * 4).loss([1, 1e9]) == pytest.approx([3.0, 3.0])


def test_a_loss_that_rises_with_the_text_gives_a_flat_law() -> None:
    law = fit_power_law(TOKENS, [3.0, 3.1, 3.2, 3.3])
    assert (law.scale, law.exponent) == (0.0, 0.0)
    assert law.floor == pytest.approx(3.15)


def test_a_loss_that_falls_ever_faster_has_no_floor() -> None:
    law = fit_power_law(TOKENS, [5.0, 4.8, 4.3, 3.4])
    assert law.floor == 0.0
    assert EXPONENTS[0] <= law.exponent <= EXPONENTS[1]


def test_noise_moves_the_prediction_of_twice_the_text_little() -> None:
    law = PowerLaw(2.5, 20.0, 0.25)
    wanted = float(law.loss(160_000))
    for seed in range(20):
        losses = law.loss(TOKENS) + np.random.default_rng(seed).normal(0, 0.01, len(TOKENS))
        assert float(fit_power_law(TOKENS, losses.tolist()).loss(160_000)) == pytest.approx(wanted, abs=0.08)


def test_two_amounts_of_text_determine_no_law() -> None:
    assert not can_be_fitted([10_000, 20_000])
    assert not can_be_fitted([10_000, 20_000, 20_000])
    assert can_be_fitted([10_000, 20_000, 40_000])
    with pytest.raises(ValueError, match="2 amounts of text do not determine a power law; 3 do"):
        fit_power_law([10_000, 20_000], [4.0, 3.0])


def test_the_spread_is_of_the_laws_without_one_point() -> None:
    law = PowerLaw(2.0, 30.0, 0.3)
    losses = law.loss(TOKENS).tolist()
    assert spread(TOKENS, losses, 160_000) == pytest.approx((law.loss(160_000), law.loss(160_000)), abs=1e-3)
    losses[-1] += 0.05
    found = spread(TOKENS, losses, 160_000)
    assert found is not None
    # Omitting the raised point gives the old law, omitting another a higher one.
    assert found[0] == pytest.approx(float(law.loss(160_000)), abs=1e-3)
    assert found[1] > found[0] + 0.05
    assert spread(TOKENS[:3], losses[:3], 160_000) is None
