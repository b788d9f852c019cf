"""Quantize weights to 8 or 4 bits, in blocks along the input, as ONNX Runtime's `MatMulNBits` reads them.

With 4 bits, what an input's weights lose by rounding is made up for by those of the inputs after it (GPTQ).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from pipeline.errors import UserError

SCALE_STEPS = 24
"""The number of scales tried per block: a finer grid changes the error by under 1 %."""
NARROWEST_SCALE = 0.6
"""The smallest scale tried, relative to the one that just holds the block's largest weight: it clips that weight for
finer steps elsewhere."""
SMALLEST_BLOCK = 16
"""The smallest block that `MatMulNBits` takes."""
DAMPING = 0.1
"""What is added to the moments of each input, in units of their mean, as they are measured on few texts."""
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


def quantize(
    weight: NDArray[np.float32], bits: int, largest_block: int, moments: NDArray[np.float32] | None = None
) -> Quantized:
    """Round `weight` `[inputs, outputs]` to steps, symmetric around zero, with one scale per block.

    A block has `largest_block` inputs, or the largest smaller power of two that divides the inputs. Raises `UserError`
    if that is below `SMALLEST_BLOCK`.

    With 8 bits, weights are rounded to nearest with the scale that holds the block's largest. With 4 bits, each block
    has the scale of least squared error, which may clip: see `_search_scales`. `moments`, the second moments of the
    inputs `[inputs, inputs]`, make the error of the product small, instead of that of the weights: see `_compensate`.
    """
    inputs, outputs = weight.shape
    block = math.gcd(inputs, largest_block)
    if block < SMALLEST_BLOCK:
        raise UserError(f"precision: {bits} bits need widths that are multiples of {SMALLEST_BLOCK}, got {inputs}")
    blocks = inputs // block
    pulls = None if moments is None else _pulls(moments)
    values = np.empty((outputs, blocks, block * bits // 8), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    for start in range(0, outputs, CHUNK_OUTPUTS):
        chunk = np.ascontiguousarray(weight[:, start : start + CHUNK_OUTPUTS].T)
        rows = slice(start, start + len(chunk))
        if pulls is None:
            steps, scales[rows] = _round(chunk.reshape(-1, blocks, block), bits)
        else:
            steps, scales[rows] = _compensate(chunk, bits, block, pulls)
        values[rows] = steps if bits == 8 else steps[..., 0::2] | (steps[..., 1::2] << 4)
    return Quantized(values, scales, bits, block)


def dequantize(kept: Quantized) -> NDArray[np.float32]:
    """Return the weights `[inputs, outputs]` that the steps stand for."""
    values = kept.values
    if kept.bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], -1)
    weights = (values.astype(np.float32) - kept.zero_point) * kept.scales[..., None]
    return np.ascontiguousarray(weights.reshape(len(values), -1).T)


def _round(blocks: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return steps from 0 to 2**bits - 1, and the scale of each block `[..., block]`."""
    zero_point = 1 << (bits - 1)
    scales = np.abs(blocks).max(axis=-1) / (zero_point - 1) if bits == 8 else _search_scales(blocks, zero_point)
    scales = scales.astype(np.float32)
    steps = _nearest(blocks, scales, zero_point)
    return (steps + zero_point).astype(np.uint8), scales


def _compensate(
    weight: NDArray[np.float32], bits: int, block: int, pulls: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return steps `[outputs, blocks, block]` and scales `[outputs, blocks]` of `weight` `[outputs, inputs]`.

    The inputs are rounded one after the other, and what each loses is taken from those after it, as far as they are
    correlated with it (GPTQ: Frantar et al., 2023, arXiv 2210.17323, algorithm 1).
    """
    zero_point = 1 << (bits - 1)
    rest = weight.T.copy()
    inputs, outputs = rest.shape
    steps = np.empty((outputs, inputs // block, block), np.uint8)
    scales = np.empty((outputs, inputs // block), np.float32)
    for index, start in enumerate(range(0, inputs, block)):
        end = start + block
        own, lost = rest[start:end], np.empty((block, outputs), np.float32)
        scale = _search_scales(np.ascontiguousarray(own.T), zero_point)
        for place in range(block):
            step = _nearest(own[place, :, None], scale, zero_point)[:, 0]
            steps[:, index, place] = step + zero_point
            lost[place] = (own[place] - step * scale) / pulls[start + place, start + place]
            own[place + 1 :] -= np.outer(pulls[start + place, start + place + 1 : end], lost[place])
        rest[end:] -= pulls[start:end, end:].T @ lost
        scales[:, index] = scale
    return steps, scales


def _pulls(moments: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the upper factor U of the inverse of the damped moments, which is U^T U."""
    damped = moments.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * damped.diagonal().mean() or 1.0
    # Turned round, the lower factor of the matrix becomes the upper factor of its inverse.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.ascontiguousarray(solve_triangular(lower, np.eye(len(lower)), lower=True)[::-1, ::-1], np.float32)


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
