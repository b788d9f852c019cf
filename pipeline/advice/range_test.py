"""The arithmetic of a learning-rate range test, for `find-learning-rate`: which rates of a rising series learn?

Smith, 2017, "Cyclical Learning Rates for Training Neural Networks"; the rate rises exponentially, as in fastai.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPAN_SHARE = 0.1
"""The span of the moving average as a share of all steps: its lag in rate is then the same for any number of steps."""
DIVERGED = 2.0
"""The multiple of the lowest smoothed loss at which the test ends."""
WELL_DOWN = 0.75
"""The share of the fall from the first smoothed loss to the lowest at which the suggested rate is."""
LEAST_FALL_NATS = 0.02
"""The least fall of the smoothed loss that counts; less may be noise."""

Floats = NDArray[np.float64]


def rising_rates(lowest: float, highest: float, steps: int) -> Floats:
    """Return the rate of each step, `[steps]`: each is the one before times the same factor."""
    return np.geomspace(lowest, highest, steps)


def even_out(losses: ArrayLike, base_losses: ArrayLike) -> Floats:
    """Return the losses as if every step's text were equally hard for the base.

    Both are `[steps]`, of the same text. Texts differ in difficulty by far more than a step improves the model; for a
    base that knows the language, that is most of the noise.
    """
    own = np.asarray(base_losses, dtype=np.float64)
    return np.asarray(losses, dtype=np.float64) - own + own.mean()


def span_of(steps: int) -> int:
    """Return the span of the moving average, in steps, for a test of this many steps."""
    return max(2, round(SPAN_SHARE * steps))


def smooth(losses: ArrayLike, span: int) -> Floats:
    """Return the exponential moving average over about `span` steps, corrected for its start at zero.

    The correction is that of Kingma and Ba, 2015, section 3.
    """
    weight, averages, average = 1 - 1 / span, [], 0.0
    for step, loss in enumerate(np.asarray(losses, dtype=np.float64), start=1):
        average = weight * average + (1 - weight) * loss
        averages.append(average / (1 - weight**step))
    return np.array(averages)


def has_diverged(averages: Floats) -> bool:
    """Return whether the test is over: the last smoothed loss is above `DIVERGED` times the lowest, or not finite."""
    return not math.isfinite(averages[-1]) or bool(averages[-1] > DIVERGED * averages.min())


def rate_well_down(rates: ArrayLike, averages: Floats, span: int) -> float | None:
    """Return the first rate at which the smoothed loss has completed `WELL_DOWN` of its fall.

    On the slope, every test reaches a given level at about the same rate, whatever the noise. The minimum is flat, so
    noise moves its rate by a factor of several. The steepest fall is at the rate that leaves the base most easily, far
    below what Muon can take.

    The first `span` steps do not count: the average covers too few steps there. Returns None if the loss falls by less
    than `LEAST_FALL_NATS` after them.
    """
    counted = averages[span:]
    if not len(counted) or counted[0] - counted.min() < LEAST_FALL_NATS:
        return None
    level = counted[0] - WELL_DOWN * (counted[0] - counted.min())
    return float(np.asarray(rates)[span + int(np.argmax(counted <= level))])
