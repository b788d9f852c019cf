"""Weights in 8 and 4 bits: rounding, clipping, blocks and bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.export.quantization import DAMPING, dequantize, quantize


def weights(seed: int, inputs: int = 64, outputs: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_lie_on_steps_are_kept_exactly(bits: int) -> None:
    half = 1 << (bits - 1)
    steps = np.random.default_rng(0).integers(-half, half, (64, 5)).astype(np.float32)
    # The largest step a block on the side that each way of scaling holds.
    steps[::16] = -half if bits == 4 else half - 1
    steps = np.clip(steps, -half if bits == 4 else 1 - half, half - 1)
    np.testing.assert_allclose(dequantize(quantize(steps * 0.25, bits, 16)), steps * 0.25, rtol=1e-6)


@given(st.integers(0, 1000), st.sampled_from([16, 32, 64]))
def test_8_bits_are_off_by_half_a_step_at_most(seed: int, block: int) -> None:
    weight = weights(seed)
    kept = quantize(weight, 8, block)
    largest = np.abs(weight.T.reshape(40, -1, block)).max(axis=-1)
    np.testing.assert_allclose(kept.scales, largest / 127, rtol=1e-6)
    error = np.abs(dequantize(kept) - weight).T.reshape(40, -1, block)
    assert (error <= kept.scales[..., None] * 0.5001).all()


@given(st.integers(0, 1000))
def test_4_bits_are_nearer_than_rounding_to_nearest(seed: int) -> None:
    weight = weights(seed)
    blocks = weight.T.reshape(40, 2, 32)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / 7
    plain = np.clip(np.rint(blocks / scales), -8, 7) * scales
    found = dequantize(quantize(weight, 4, 32)).T.reshape(40, 2, 32)
    assert ((found - blocks) ** 2).sum() < ((plain - blocks) ** 2).sum()


def test_two_steps_of_4_bits_share_a_byte_the_lower_first() -> None:
    weight = np.full((16, 1), -8.0, np.float32)
    weight[1] = 7
    kept = quantize(weight, 4, 16)
    # Scale 1, zero point 8: -8 is 0 and 7 is 15.
    assert kept.values[0, 0, :2].tolist() == [0xF0, 0x00]
    np.testing.assert_allclose(kept.scales, [[1.0]])


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits: int) -> None:
    np.testing.assert_array_equal(dequantize(quantize(np.zeros((32, 3), np.float32), bits, 32)), 0)


@pytest.mark.parametrize(("inputs", "block"), [(64, 64), (192, 64), (96, 32), (48, 16)])
def test_a_block_divides_the_inputs(inputs: int, block: int) -> None:
    assert quantize(weights(0, inputs), 8, 64).block == block


def test_a_width_that_no_block_divides_is_refused() -> None:
    with pytest.raises(UserError, match="8 bits need widths that are multiples of 16, got 40"):
        quantize(weights(0, 40), 8, 64)


def inputs_like(seed: int, inputs: int, tokens: int = 400) -> np.ndarray:
    """Correlated inputs `[tokens, inputs]`: some directions are far larger than others."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((inputs, inputs)) * np.geomspace(1, 0.05, inputs)[:, None]
    return (generator.standard_normal((tokens, inputs)) @ mixing).astype(np.float32)


@given(st.integers(0, 1000), st.sampled_from([16, 32, 64]))
def test_moments_make_the_product_more_exact(seed: int, block: int) -> None:
    weight, (seen, unseen) = weights(seed), np.split(inputs_like(seed, 64, tokens=500), [400])

    def error(moments: np.ndarray | None) -> float:
        return float(((unseen @ (dequantize(quantize(weight, 4, block, moments)) - weight)) ** 2).sum())

    assert error(seen.T @ seen) < 0.8 * error(None)


def test_moments_against_the_rule_as_the_paper_states_it() -> None:
    """Optimal Brain Quantization in a fixed order: after each input, the rest is solved for anew."""
    weight, seen = weights(3, inputs=16, outputs=6), inputs_like(3, 16)
    moments = seen.T @ seen
    kept = quantize(weight, 4, 16, moments)
    scales = quantize(weight, 4, 16).scales[:, 0]
    damped = moments.astype(np.float64) + DAMPING * moments.diagonal().mean() * np.eye(16)
    rest, steps = weight.astype(np.float64), np.empty((16, 6))
    for place in range(16):
        steps[place] = np.clip(np.rint(rest[place] / scales), -8, 7)
        error = rest[place] - steps[place] * scales
        # The least squared error of the product, given this one, moves the inputs that are not rounded yet.
        later = slice(place + 1, 16)
        rest[later] += np.linalg.solve(damped[later, later], np.outer(damped[later, place], error))
    np.testing.assert_array_equal(dequantize(kept), (steps * scales).astype(np.float32))


def test_inputs_that_are_not_correlated_are_rounded_as_without_moments() -> None:
    weight = weights(5)
    expected, found = quantize(weight, 4, 32), quantize(weight, 4, 32, np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.scales, expected.scales)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, moments = weights(6), np.zeros((64, 64), np.float32)
    assert np.array_equal(quantize(weight, 4, 32, moments).values, quantize(weight, 4, 32).values)
    seen = inputs_like(6, 64)
    seen[:, 7] = 0
    assert np.isfinite(dequantize(quantize(weight, 4, 32, seen.T @ seen))).all()
