"""Weights in 8 and 4 bits: rounding, clipping, blocks and bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.export.quantization import Quantized, quantize


def dequantize(quantized: Quantized) -> np.ndarray:
    """Return the weights that the steps stand for, `[inputs, outputs]`."""
    values = quantized.values
    if quantized.bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], -1)
    weights = (values.astype(np.float32) - quantized.zero_point) * quantized.scales[..., None]
    return np.ascontiguousarray(weights.reshape(len(values), -1).T)


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
