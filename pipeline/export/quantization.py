"""Quantize weights to 8 or 4 bits, in blocks along the input, as ONNX Runtime's `MatMulNBits` reads them."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

SCALE_STEPS = 24
"""The number of scales tried per block: a finer grid changes the error by under 1 %."""
NARROWEST_SCALE = 0.6
"""The smallest scale tried, relative to the one that just holds the block's largest weight: it clips that weight for
finer steps elsewhere."""
SMALLEST_BLOCK = 16
"""The smallest block that `MatMulNBits` takes."""
CHUNK_OUTPUTS = 4096
"""The number of outputs quantized at a time, to bound memory."""


class Quantized(NamedTuple):
    """A weight matrix `[inputs, outputs]` in blocks of inputs."""

    values: NDArray[np.uint8]
    """Steps from the zero point, `[outputs, blocks, block * bits / 8]`; two 4-bit ones per byte, the lower first."""
    scales: NDArray[np.float32]
    """The size of a step, `[outputs, blocks]`."""
    bits: int
    block: int

    @property
    def zero_point(self) -> int:
        return int(1 << (self.bits - 1))


def quantize(weight: NDArray[np.float32], bits: int, largest_block: int) -> Quantized:
    """Round `weight` `[inputs, outputs]` to steps, symmetric around zero, with one scale per block.

    A block has `largest_block` inputs, or the largest smaller power of two that divides the inputs. Raises `UserError`
    if that is below `SMALLEST_BLOCK`.

    With 8 bits, weights are rounded to nearest with the scale that holds the block's largest. With 4 bits, each block
    has the scale of least squared error, which may clip: see `_search_scales`.
    """
    inputs, outputs = weight.shape
    block = math.gcd(inputs, largest_block)
    if block < SMALLEST_BLOCK:
        raise UserError(f"precision: {bits} bits need widths that are multiples of {SMALLEST_BLOCK}, got {inputs}")
    blocks = inputs // block
    values = np.empty((outputs, blocks, block * bits // 8), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    for start in range(0, outputs, CHUNK_OUTPUTS):
        chunk = np.ascontiguousarray(weight[:, start : start + CHUNK_OUTPUTS].T)
        rows = slice(start, start + len(chunk))
        steps, scales[rows] = _round(chunk.reshape(-1, blocks, block), bits)
        values[rows] = steps if bits == 8 else steps[..., 0::2] | (steps[..., 1::2] << 4)
    return Quantized(values, scales, bits, block)


def _round(blocks: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return steps from 0 to 2**bits - 1, and the scale of each block `[..., block]`."""
    zero_point = 1 << (bits - 1)
    scales = np.abs(blocks).max(axis=-1) / (zero_point - 1) if bits == 8 else _search_scales(blocks, zero_point)
    scales = scales.astype(np.float32)
    steps = _nearest(blocks, scales, zero_point)
    return (steps + zero_point).astype(np.uint8), scales


def _nearest(blocks: NDArray[np.float32], scales: NDArray[np.float32], zero_point: int) -> NDArray[np.float32]:
    """Return whole numbers of steps, clipped to what the bits hold; a block of zeros has the scale 0."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    steps: NDArray[np.float32] = np.clip(np.rint(blocks * inverse[..., None]), -zero_point, zero_point - 1)
    return steps


def _search_scales(blocks: NDArray[np.float32], zero_point: int) -> NDArray[np.float32]:
    """Return the scale of each block with the least squared error.

    The range reaches one step further below zero than above, so a block is scaled to have its largest weight there,
    whatever its sign (as llama.cpp's q4_0 does). From that scale down, a grid of scales is tried, each with the
    least-squares fit of its own rounding.
    """
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    widest = (largest / -zero_point).astype(np.float32)
    best = widest
    least = np.full(widest.shape, np.inf, np.float32)
    for share in np.linspace(1, NARROWEST_SCALE, SCALE_STEPS, dtype=np.float32):
        steps = _nearest(blocks, widest * share, zero_point)
        squares = (steps * steps).sum(axis=-1)
        products = (steps * blocks).sum(axis=-1)
        fitted = np.divide(products, squares, out=np.zeros_like(products), where=squares != 0)
        # The squared error with the fitted scale is |w|^2 - (w.q)^2 / |q|^2; its second term depends on the steps.
        error = -products * fitted
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, fitted, best)
    return best
