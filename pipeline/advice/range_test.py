"""A learning-rate range test: training at a rate that rises from step to step tells which rates learn.

Smith, 2017, "Cyclical Learning Rates for Training Neural Networks"; the rate rises exponentially, as fastai has it.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPAN_SHARE = 0.1
"""Of all steps, that the moving average looks back over: with more steps to a rate it lags by the same factor of it."""
DIVERGED = 2.0
"""The test ends where the smoothed loss is so many times the lowest that it was."""
WELL_DOWN = 0.75
"""Of the way from the first smoothed loss to the lowest: where the suggested rate is."""
LEAST_FALL_NATS = 0.02
"""Of the smoothed loss; less may be noise."""

Floats = NDArray[np.float64]


def rising_rates(lowest: float, highest: float, steps: int) -> Floats:
    """The rate of each step, `[steps]`: every one the one before times the same factor."""
    return np.geomspace(lowest, highest, steps)


def evened(losses: ArrayLike, base_losses: ArrayLike) -> Floats:
    """The losses as if every step's text were equally hard to the base.

    Both are `[steps]`, of the same text. What one text is harder than another is far more than what a step teaches: of
    a base that knows the language it makes up most of the noise.
    """
    own = np.asarray(base_losses, dtype=np.float64)
    return np.asarray(losses, dtype=np.float64) - own + own.mean()


def span_of(steps: int) -> int:
    """How many steps the moving average of a test of so many looks back over."""
    return max(2, round(SPAN_SHARE * steps))


def smoothed(losses: ArrayLike, span: int) -> Floats:
    """The exponential moving average over about `span` steps, corrected for having begun with nothing.

    The correction is that of Kingma and Ba, 2015, section 3.
    """
    weight, averages, average = 1 - 1 / span, [], 0.0
    for step, loss in enumerate(np.asarray(losses, dtype=np.float64), start=1):
        average = weight * average + (1 - weight) * loss
        averages.append(average / (1 - weight**step))
    return np.array(averages)


def has_diverged(averages: Floats) -> bool:
    """Whether the test is over: the last smoothed loss is `DIVERGED` times the lowest, or no number."""
    return not math.isfinite(averages[-1]) or bool(averages[-1] > DIVERGED * averages.min())


def rate_well_down(rates: ArrayLike, averages: Floats, span: int) -> float | None:
    """The first rate by which the smoothed loss has done `WELL_DOWN` of its fall.

    On the slope a level is met at the same rate in every test, whatever the noise. The lowest loss lies in a flat
    hollow, in which noise moves it by several times, and the steepest fall is at the rate that leaves the base most
    easily: far below what Muon can take.

    The first `span` steps, in which the average is still of few, do not count. None where the loss does not fall after
    them, or by less than `LEAST_FALL_NATS`.
    """
    known = averages[span:]
    if not len(known) or known[0] - known.min() < LEAST_FALL_NATS:
        return None
    level = known[0] - WELL_DOWN * (known[0] - known.min())
    return float(np.asarray(rates)[span + int(np.argmax(known <= level))])
