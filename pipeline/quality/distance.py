"""How far samples are from what people wrote: the one number that a search of decoding parameters minimizes.

No figure of samples is good by itself. Cold decoding repeats itself and is too easy to predict, hot decoding babbles;
what people wrote is in between (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). So the distance
is a sum over figures of weight · |own - human| / scale.

The scale of a figure is a tenth of the people's own, or its standard error over their texts if that is larger: a term
of 1, at weight 1, is a tenth more or less than people have. So weights say what matters, whatever the unit of a figure.
Standard errors alone would fail: a figure that hardly varies among people has a tiny error, so its term would swamp the
others. Lengths and perplexities are compared on a log scale, so twice and half count the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.quality.jackknife import jackknife_error


@dataclass(frozen=True, kw_only=True)
class SetFigures:
    """The figures of a set of samples; each is a term of the distance."""

    rep_2: float
    rep_3: float
    rep_4: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    zipf: float
    """The Zipf coefficient: see `zipf_coefficient`."""
    self_bleu: float
    """The self-BLEU, for the same n on both sides."""
    perplexity: float
    """The perplexity of the samples under the base, which has neither written them nor read what the people wrote."""
    mean_tokens: float
    mean_copy_tokens: float
    """The mean length of the longest verbatim copy in each sample."""
    looping_share: float
    form_share: float
    """The share of samples that have the form of the data; 1 if no form is asked for."""
    mauve: float | None = None
    """MAUVE against the people's texts; None leaves its term out. For people's own figures it counts as 1."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The cost of a difference of one scale in each figure; 0 leaves it out. Raises `UserError` if a weight is below 0.

    Figures that show one fault at several lengths share a weight of 1.
    """

    rep_2: float = 1 / 3
    """Repetition within a sample, the fault of cold decoding: Welleck et al. 2020, "Neural Text Generation with
    Unlikelihood Training"."""
    rep_3: float = 1 / 3
    rep_4: float = 1 / 3
    distinct_1: float = 1 / 3
    """Variety over all samples, too small when cold and too large when hot: Li et al. 2016, "A Diversity-Promoting
    Objective Function for Neural Conversation Models"."""
    distinct_2: float = 1 / 3
    distinct_3: float = 1 / 3
    zipf: float = 0.5
    """Whether rare words are as frequent: Holtzman et al. 2020. Half, because distinct-1 shows much of it."""
    self_bleu: float = 1.0
    """Whether all samples are alike: Zhu et al. 2018, "Texygen". Repetition within a sample does not show it."""
    perplexity: float = 1.0
    """Whether the text is as hard to predict as people's: Holtzman et al. 2020, who find it the clearest sign of both
    faults."""
    mean_tokens: float = 0.5
    """Whether texts are as long as people's. Half, because the limit of tokens cuts both short."""
    mean_copy_tokens: float = 1.0
    """Counts only above people's: Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models"."""
    looping_share: float = 1.0
    """Counts only above people's. A loop spoils a whole sample; rep-n shows it too."""
    form_share: float = 1.0
    """Counts only below people's. Our own, without a paper: penalties on repetition soon break a form."""
    mauve: float = 1.0
    """Differences that no count of tokens shows: Pillutla et al. 2021, "MAUVE"."""

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < math.inf:
                raise UserError(f"weight of {name}: {weight} is out of range, must be 0 or more")


BALANCED = Weights()
TERMS = tuple(field.name for field in fields(Weights))
LOGARITHMS: dict[str, Callable[[float], float]] = {
    "perplexity": math.log,
    "mean_tokens": math.log,
    "mean_copy_tokens": math.log1p,
}
"""The figures that are compared on a log scale. One is added to copies, which may have no token."""
PENALTIES = {"mean_copy_tokens": 1, "looping_share": 1, "form_share": -1}
"""The figures that count only above people's (1) or only below (-1): nobody copies too little or keeps a form too well.
"""
SHARE_OF_HUMAN = 0.1
"""The part of the people's figure that counts as 1, unless chance makes more; a step of 0.1 in a logarithm is nearly
the same part."""
DOCUMENTED_SCALES = {"mauve": SHARE_OF_HUMAN}
"""The scales without a standard error: MAUVE takes two sets of texts, and is always 1 for people's with themselves."""
LEAST_SCALE = 0.002
"""The smallest scale of any figure, as when nobody repeats four tokens: less than that is no difference."""


TAME_ABOVE = ("rep_2", "rep_3", "rep_4", "zipf", "self_bleu", "mean_copy_tokens", "looping_share")
TAME_BELOW = ("distinct_1", "distinct_2", "distinct_3", "perplexity")
"""The figures that are above people's, or below them, if decoding is too cold, and the other way if it is too hot.
Length, form and MAUVE are off for either reason."""


class Distance(NamedTuple):
    """The distance, and the terms that add up to it, by the name of their figure."""

    total: float
    terms: dict[str, float]
    too_tame: float
    """The sum of the terms that show cold decoding, which repeats itself, and of those that show neither."""
    too_wild: float
    """The sum of the terms that show hot decoding, which babbles, and of those that show neither."""


def distance(own: SetFigures, human: SetFigures, scales: Mapping[str, float], weights: Weights = BALANCED) -> Distance:
    """Return how far samples are from people's texts, with `scales` from `human_scales` of these.

    The distance is 0 if the figures are equal; other texts by the same people are mostly nearer than the sum of the
    weights. Both sides should have the same number of samples, for the same prompts, cut at the same length, because
    figures depend on that. Raises `UserError`, naming the term, for a figure or a scale that is not a finite number, or
    that has no logarithm.
    """
    here, there = _coordinates(own, "own"), _coordinates(human, "human")
    there["mauve"] = 1.0
    terms, too_tame, too_wild = {}, [], []
    for name, place in here.items():
        scale = scales.get(name, math.nan)
        if not 0 < scale < math.inf:
            raise UserError(f"distance: the scale of {name} is {scale}, must be a number above 0")
        gap = place - there[name]
        off = max(0.0, PENALTIES[name] * gap) if name in PENALTIES else abs(gap)
        term = terms[name] = getattr(weights, name) * off / scale
        is_tame = gap > 0 if name in TAME_ABOVE else gap < 0
        is_neither = name not in TAME_ABOVE + TAME_BELOW
        if is_tame or is_neither:
            too_tame.append(term)
        if not is_tame or is_neither:
            too_wild.append(term)
    return Distance(math.fsum(terms.values()), terms, math.fsum(too_tame), math.fsum(too_wild))


def human_scales(human: SetFigures, without: Sequence[SetFigures]) -> dict[str, float]:
    """Return the scale of each term, from the figures of all texts of people and those `without` each text in turn.

    The scale of the share of loops is at least one sample. Raises `UserError` for fewer than two texts, and as
    `distance` does.
    """
    rows = [_coordinates(scores, "human") for scores in without]
    names = [name for name in TERMS if name not in DOCUMENTED_SCALES]
    errors = jackknife_error(np.array([[row[name] for name in names] for row in rows]))
    scales = dict(DOCUMENTED_SCALES)
    places = _coordinates(human, "human")
    for name, error in zip(names, errors.tolist(), strict=True):
        tenth = SHARE_OF_HUMAN * (1 if name in LOGARITHMS else abs(places[name]))
        least = 1 / len(rows) if name == "looping_share" else LEAST_SCALE
        scales[name] = max(error, tenth, least)
    return scales


def _coordinates(scores: SetFigures, side: str) -> dict[str, float]:
    """Return each figure that is not None, on the axis on which differences are taken."""
    places = {}
    for name in TERMS:
        value = getattr(scores, name)
        if value is None:
            continue
        if not math.isfinite(value):
            raise UserError(f"distance: {name} of the {side} samples is {value}, must be a finite number")
        if LOGARITHMS.get(name) is math.log and value <= 0:
            raise UserError(
                f"distance: {name} of the {side} samples is {value}, must be above 0; check that they are not empty"
            )
        places[name] = LOGARITHMS[name](value) if name in LOGARITHMS else value
    return places
