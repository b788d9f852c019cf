"""How far a figure would move with other prompts: the jackknife, which leaves each prompt out once.

Two systems that continued the same prompts are compared prompt by prompt, so that an easy one is easy for both.

The bootstrap is no use here. It draws some samples twice, and a sample resembles itself: for a figure that compares
samples with each other (`distinct_n`, `self_bleu`), its interval can miss the figure itself.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from pipeline.errors import UserError

Floats = npt.NDArray[np.float64]
T = TypeVar("T")
R = TypeVar("R")

CONFIDENCE = 0.95
"""The confidence of every interval."""


class Interval(NamedTuple):
    """A measured value, and the range that contains it with a confidence of `CONFIDENCE`."""

    estimate: float
    low: float
    high: float


def leave_each_out(samples: Sequence[T], statistic: Callable[[list[T]], R]) -> list[R]:
    """Return the statistic without the first sample, without the second, and so on."""
    return [statistic([*samples[:index], *samples[index + 1 :]]) for index in range(len(samples))]


def jackknife_error(without: npt.NDArray[np.floating]) -> Floats:
    """Return the standard error of a figure from its values `without` one sample each, [samples].

    Takes several figures at once too, [samples, figures].

    The root of (n - 1) / n · Σ (value - mean)², Tukey 1958, "Bias and Confidence in Not Quite Large Samples"; for a
    mean it is the usual standard error. It holds for figures that move a little with each sample: not for a maximum.
    Raises `UserError` for fewer than two samples.
    """
    if len(without) < 2:
        raise UserError(f"jackknife: a standard error takes two samples at least, there are {len(without)}")
    return np.asarray(np.sqrt((len(without) - 1) * without.var(axis=0, dtype=np.float64)))


def jackknife_reach(without: npt.NDArray[np.floating]) -> Floats:
    """Return half the width of the interval of one figure or of several: see `jackknife_interval`."""
    return jackknife_error(without) * float(stdtrit(len(without) - 1, (1 + CONFIDENCE) / 2))


def jackknife_interval(estimate: float, without: npt.NDArray[np.floating]) -> Interval:
    """Return the interval of an estimate from its values `without` one sample each, [samples].

    `jackknife_error` times Student's t with n - 1 degrees of freedom, on both sides. Raises `UserError` as
    `jackknife_error` does.
    """
    reach = float(jackknife_reach(without))
    return Interval(estimate, estimate - reach, estimate + reach)
