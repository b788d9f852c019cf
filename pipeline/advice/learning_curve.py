"""How the loss falls as the training text grows: a power law through a few fine-tunings, for the command `advise`.

loss(tokens) = floor + scale · tokens^-exponent (Hestness et al., 2017, "Deep Learning Scaling is Predictable,
Empirically"; Kaplan et al., 2020, "Scaling Laws for Neural Language Models").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar, nnls

LEAST_SIZES = 3
"""The number of different amounts of text that determine the three numbers of the law."""
EXPONENTS = (0.01, 2.0)
"""The bounds of the exponent. Hestness et al. find 0.07 to 0.35 on real data; theory, and memorized small tables,
give up to 1 and more."""
TRIED_EXPONENTS = 400
"""The exponents of the first search; the best is refined, as the error may have more than one minimum."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """The expected loss, in nats per token."""

    floor: float
    """The loss that no amount of text removes."""
    scale: float
    exponent: float

    def loss(self, tokens: ArrayLike) -> Floats:
        return self.floor + self.scale * np.asarray(tokens, dtype=np.float64) ** -self.exponent


def can_be_fitted(tokens: Sequence[float]) -> bool:
    """Return whether these amounts of text determine a law."""
    return len(set(tokens)) >= LEAST_SIZES


def fit_power_law(tokens: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Return the law of least squared error, with floor and scale at least 0 and the exponent within `EXPONENTS`.

    For a given exponent, floor and scale are a linear problem, so only one number is searched for, and few points
    suffice. A loss that does not fall as the text grows gives a flat law, with scale and exponent 0. Raises
    `ValueError` for fewer than `LEAST_SIZES` different amounts of text.
    """
    if not can_be_fitted(tokens):
        raise ValueError(f"{len(set(tokens))} amounts of text do not determine a power law; {LEAST_SIZES} do")
    largest = max(tokens)
    shares, values = np.asarray(tokens, dtype=np.float64) / largest, np.asarray(losses, dtype=np.float64)

    def solve(exponent: float) -> tuple[Floats, float]:
        """Return [floor, scale] and the error; the scale is for tokens in units of the largest amount."""
        found, error = nnls(np.stack([np.ones_like(shares), shares**-exponent], axis=1), values)
        return found, float(error)

    tried = np.geomspace(*EXPONENTS, TRIED_EXPONENTS)
    best = int(np.argmin([solve(exponent)[1] for exponent in tried]))
    around = (tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)])
    refined = minimize_scalar(lambda exponent: solve(exponent)[1], bounds=around, method="bounded")
    exponent = min(float(refined.x), float(tried[best]), key=lambda exponent: solve(exponent)[1])
    floor, scale = solve(exponent)[0].tolist()
    return PowerLaw(floor, scale * largest**exponent, exponent) if scale > 0 else PowerLaw(floor, 0.0, 0.0)


def spread(tokens: Sequence[float], losses: Sequence[float], wanted: float) -> tuple[float, float] | None:
    """Return the lowest and highest loss at `wanted` tokens that laws through all points but one predict.

    Returns None if the points are too few to omit one.
    """
    predictions = [
        float(fit_power_law(kept, [*losses[:index], *losses[index + 1 :]]).loss(wanted))
        for index in range(len(tokens))
        if can_be_fitted(kept := [*tokens[:index], *tokens[index + 1 :]])
    ]
    return (min(predictions), max(predictions)) if predictions else None
