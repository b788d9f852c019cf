"""How the loss falls as the training text grows: a power law through a few fine-tunings.

loss(tokens) = floor + scale · tokens^-exponent (Hestness et al., 2017, "Deep Learning Scaling is Predictable,
Empirically"; Kaplan et al., 2020, "Scaling Laws for Neural Language Models").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar, nnls

LEAST_SIZES = 3
"""Different amounts of text that determine the three numbers of the law."""
EXPONENTS = (0.01, 2.0)
"""Bounds. Hestness et al. find 0.07 to 0.35 on real data; theory, and small tables by heart, give up to 1 and more."""
TRIED_EXPONENTS = 400
"""Of which the best is refined: the error may have more than one hollow."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """The loss that is to be expected, in nats a token."""

    floor: float
    """What no amount of text takes away."""
    scale: float
    exponent: float

    def loss(self, tokens: ArrayLike) -> Floats:
        return self.floor + self.scale * np.asarray(tokens, dtype=np.float64) ** -self.exponent


def can_be_fitted(tokens: Sequence[float]) -> bool:
    """Whether these amounts of text determine a law."""
    return len(set(tokens)) >= LEAST_SIZES


def fit_power_law(tokens: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The law of the least squared error with neither floor nor scale below 0, and the exponent within `EXPONENTS`.

    For a given exponent floor and scale are a linear problem, which leaves one number to search for: few points cannot
    lead it astray. A loss that does not fall as the text grows gives a flat law, of scale and exponent 0. Raises
    `ValueError` for fewer than `LEAST_SIZES` different amounts of text.
    """
    if not can_be_fitted(tokens):
        raise ValueError(f"{len(set(tokens))} amounts of text do not determine a power law; {LEAST_SIZES} do")
    largest = max(tokens)
    shares, values = np.asarray(tokens, dtype=np.float64) / largest, np.asarray(losses, dtype=np.float64)

    def solve(exponent: float) -> tuple[Floats, float]:
        """Floor and scale, this one for tokens in units of the largest amount, and the error."""
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
    """The lowest and the highest loss at `wanted` tokens that laws through all points but one predict.

    None where points are too few to leave one out.
    """
    predictions = [
        float(fit_power_law(kept, [*losses[:left_out], *losses[left_out + 1 :]]).loss(wanted))
        for left_out in range(len(tokens))
        if can_be_fitted(kept := [*tokens[:left_out], *tokens[left_out + 1 :]])
    ]
    return (min(predictions), max(predictions)) if predictions else None
