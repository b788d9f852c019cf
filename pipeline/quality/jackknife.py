"""How far a figure would move with other samples.

What is drawn anew are the prompts, each with the sample that continues it: two models that continued the same prompts
are compared prompt by prompt, so that an easy one is easy for both.

A sample that is drawn twice resembles itself. Where a figure tells how samples resemble each other (`distinct_n`,
`self_bleu`), the bootstrap lies beside it, differences of two systems included: `jackknife`, which draws nothing
twice, is the one to ask.
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

RESAMPLES = 2000
"""Efron and Tibshirani 1993, "An Introduction to the Bootstrap", ask for 1000 at least where ends are wanted."""
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """What was measured, and between which values it lies with the confidence asked for."""

    estimate: float
    low: float
    high: float


def bootstrap(
    samples: Sequence[T],
    statistic: Callable[[list[T]], float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of a statistic of samples.

    As many samples as there are are drawn from them with replacement, `resamples` times; the interval lies between the
    quantiles (1 - confidence) / 2 and (1 + confidence) / 2 of the statistic of those. Efron 1979, "Bootstrap Methods:
    Another Look at the Jackknife"; 1981 for the percentiles. The same seed gives the same draws for as many samples.
    Of few samples the interval is too narrow, and of one it is a point. Raises `UserError` where there is none.
    """
    rows = drawn(len(samples), resamples, seed)
    found = np.array([statistic([samples[index] for index in row]) for row in rows.tolist()], dtype=np.float64)
    return _interval(statistic(list(samples)), found, confidence)


def bootstrap_mean(
    values: npt.NDArray[np.floating], *, seed: int, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Interval:
    """What `bootstrap` says of the mean of `values` [samples], all resamples at once.

    Of two systems' values for the same prompts, the difference gives the paired interval.
    """
    rows = drawn(len(values), resamples, seed)
    exact = np.asarray(values, dtype=np.float64)
    return _interval(float(exact.mean()), exact[rows].mean(axis=1), confidence)


def bootstrap_difference(
    first: Sequence[T],
    second: Sequence[T],
    statistic: Callable[[list[T]], float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of statistic(first) - statistic(second), of two systems' samples for the same prompts.

    Each resample draws the same prompts for both. Where the interval holds no 0, the difference is more than chance at
    this confidence. Raises `UserError` where there is no sample, or not as many of one as of the other.
    """
    pairs, difference = _paired(first, second, statistic)
    return bootstrap(pairs, difference, seed=seed, resamples=resamples, confidence=confidence)


def jackknife(
    samples: Sequence[T], statistic: Callable[[list[T]], float], *, confidence: float = CONFIDENCE
) -> Interval:
    """Interval of a statistic of samples by its `jackknife_error`, with Student's t of n - 1 degrees of freedom.

    Raises `UserError` where there are fewer than two samples.
    """
    without = np.array(leave_each_out(samples, statistic), dtype=np.float64)
    # First what a statistic of no sample would fall over.
    reach = _reach(without, confidence)
    return _around(statistic(list(samples)), reach)


def jackknife_interval(
    estimate: float, without: npt.NDArray[np.floating], *, confidence: float = CONFIDENCE
) -> Interval:
    """What `jackknife` says of an estimate, from its values `without` one sample each, [samples]."""
    return _around(estimate, _reach(without, confidence))


def jackknife_difference(
    first: Sequence[T], second: Sequence[T], statistic: Callable[[list[T]], float], *, confidence: float = CONFIDENCE
) -> Interval:
    """What `bootstrap_difference` says, by `jackknife`: each prompt is left out of both."""
    pairs, difference = _paired(first, second, statistic)
    return jackknife(pairs, difference, confidence=confidence)


def drawn(samples: int, resamples: int, seed: int) -> npt.NDArray[np.int64]:
    """Which samples each resample holds, int64 [resamples, samples]. Raises `UserError` where there is no sample."""
    if samples == 0:
        raise UserError("bootstrap: there is no sample to draw from, give at least one")
    return np.random.default_rng(seed).integers(0, samples, (resamples, samples))


def leave_each_out(samples: Sequence[T], statistic: Callable[[list[T]], R]) -> list[R]:
    """The statistic without the first sample, without the second, and so on."""
    return [statistic([*samples[:index], *samples[index + 1 :]]) for index in range(len(samples))]


def jackknife_error(without: npt.NDArray[np.floating]) -> Floats:
    """Standard error of a figure from its values `without` one sample each, [samples], or of many [samples, figures].

    The root of (n - 1) / n · Σ (value - mean)², Tukey 1958, "Bias and Confidence in Not Quite Large Samples"; of a mean
    it is the usual one. It holds where a figure moves a little with each sample: not for a maximum. Raises `UserError`
    where there are fewer than two samples, of which nothing can be left out.
    """
    if len(without) < 2:
        raise UserError(f"jackknife: a standard error takes two samples at least, there are {len(without)}")
    return np.asarray(np.sqrt((len(without) - 1) * without.var(axis=0, dtype=np.float64)))


def _paired(
    first: Sequence[T], second: Sequence[T], statistic: Callable[[list[T]], float]
) -> tuple[list[tuple[T, T]], Callable[[list[tuple[T, T]]], float]]:
    """The samples of two systems prompt by prompt, and the difference of the statistic of such pairs."""
    if len(first) != len(second):
        raise UserError(
            f"{len(first)} samples stand against {len(second)}; pairs need a sample of both for each prompt"
        )

    def difference(pairs: list[tuple[T, T]]) -> float:
        return statistic([one for one, _ in pairs]) - statistic([other for _, other in pairs])

    return list(zip(first, second, strict=True)), difference


def _reach(without: npt.NDArray[np.floating], confidence: float) -> float:
    return float(jackknife_error(without)) * float(stdtrit(len(without) - 1, (1 + confidence) / 2))


def _around(estimate: float, reach: float) -> Interval:
    return Interval(estimate, estimate - reach, estimate + reach)


def _interval(estimate: float, found: Floats, confidence: float) -> Interval:
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Interval(estimate, low, high)
