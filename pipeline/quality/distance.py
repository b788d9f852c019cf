"""How far samples are from what people wrote, and whether they have more faults: what a search of decoding minimizes.

Two things decide, in this order:

1. **Faults**, which readers do not forgive: invented words, broken sentences, loops, copies. Each may occur as often
   as in people's texts, up to the end of the interval that chance allows these. What is above that is the `excess`.
2. **Nearness.** No other figure of samples is good by itself. Cold decoding repeats itself and is too easy to predict;
   hot decoding is too varied (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). So the distance is
   a sum over figures of weight · |own - human| / scale.

Nearness alone prefers a babbling decoding: people write in a more varied way than a weak model that makes sense.
Readers see one text and not the statistics of many (Ippolito et al. 2020, "Automatic Detection of Generated Text is
Easiest when Humans are Fooled"). docs/decoding.md has the comparison with blind reading.

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
from pipeline.quality.faults import FaultRates
from pipeline.quality.jackknife import jackknife_error, jackknife_reach


@dataclass(frozen=True, kw_only=True)
class SetFigures(FaultRates):
    """The figures of a set of samples. Some are faults, some are terms of the distance, the others only inform."""

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
    """The mean length of the longest verbatim copy in each sample (Carlini et al. 2023, "Quantifying Memorization
    Across Neural Language Models")."""
    looping_share: float
    form_share: float | None
    """The share of samples that have the form of the data; 1 if no form is asked for. None if no text of people has it:
    it then says nothing, and is no fault."""
    mauve: float | None = None
    """MAUVE against the people's texts; None for people's own figures."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The cost of a difference of one scale in each figure; 0 leaves it out. Raises `UserError` if a weight is below 0.

    One figure per kind of difference. Perplexity has the largest weight, because only it passes the ladder of
    `benchmarks/figures.py`; the others depend on the length of texts, so both sides are cut at the same length. MAUVE
    of tens of texts sees less than any of them and is no term.
    """

    rep_2: float = 0.5
    """Repetition within a sample, the fault of cold decoding: Welleck et al. 2020, "Neural Text Generation with
    Unlikelihood Training"."""
    distinct_2: float = 0.5
    """Variety over all samples, too small when cold and too large when hot: Li et al. 2016, "A Diversity-Promoting
    Objective Function for Neural Conversation Models"."""
    self_bleu: float = 0.5
    """Whether all samples are alike: Zhu et al. 2018, "Texygen". Repetition within a sample does not show it."""
    perplexity: float = 1.0
    """Whether the text is as hard to predict as people's: Holtzman et al. 2020, who find it the clearest sign of both
    faults."""
    mean_tokens: float = 0.5
    """Whether texts are as long as people's. Half, because the limit of tokens cuts both short."""

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < math.inf:
                raise UserError(f"weight of {name}: {weight} is out of range, must be 0 or more")


BALANCED = Weights()
TERMS = tuple(field.name for field in fields(Weights))
FAULTS = {
    "invented_words": 1.0,
    "doubled_words": 1.0,
    "broken_quotes": 0.02,
    "broken_sentences": 0.02,
    "rep_4": 0.005,
    "empty_share": 0.0,
    "mean_copy_tokens": 0.1,
    "looping_share": 0.0,
    "form_share": 0.0,
}
"""The faults, each with the least allowance above people's, in its own unit (`LOGARITHMS`); for shares of samples the
least is one sample. docs/decoding.md says which corruptions of people's texts each of them sees."""
KINDS_OF_INVENTED_WORDS = ("lone_names", "joined_words")
"""The faults without a limit of their own, because `invented_words` counts them."""
BETTER_ABOVE = ("form_share",)
"""The faults of which people have more."""
LEAST_TOKENS = 0.01
"""The mean length that shorter ones are compared as, because 0 has no logarithm: a token in a hundred samples."""
LOGARITHMS: dict[str, Callable[[float], float]] = {
    "perplexity": math.log,
    "mean_tokens": lambda tokens: math.log(max(tokens, LEAST_TOKENS)),
    "mean_copy_tokens": math.log1p,
}
"""The figures that are compared on a log scale. One is added to copies, which may have no token."""
SHARE_OF_HUMAN = 0.1
"""The part of the people's figure that counts as 1, unless chance makes more; a step of 0.1 in a logarithm is nearly
the same part."""
EXCESS_COST = 1000.0
"""The weight of the excess in the score of a search: the distance decides only among sets with hardly any."""
EMPTY_EXCESS = 1e6
"""The excess of samples that are all empty, the worst of all: more than faults in every word of a text add up to."""
LEAST_SCALE = 0.002
"""The smallest scale of any term, as when nobody repeats four tokens: less than that is no difference."""


TAME_ABOVE = ("rep_2", "self_bleu")
TAME_BELOW = ("distinct_2", "perplexity")
"""The terms that are above people's, or below them, if decoding is too cold, and the other way if it is too hot. Length
is off for either reason."""


class Distance(NamedTuple):
    """The distance and the faults, with their parts by the name of the figure."""

    total: float
    terms: dict[str, float]
    too_tame: float
    """The sum of the terms that show cold decoding, which repeats itself, and of those that show neither."""
    too_wild: float
    """The sum of the terms that show hot decoding, which babbles, and of those that show neither."""
    excess: float
    """The sum of `excesses`; 0 if there are no more faults than people's texts may have by chance."""
    excesses: dict[str, float]
    """How far each fault is above its limit, in units of the allowance between people's figure and the limit."""

    @property
    def rank(self) -> tuple[float, float]:
        """The order of sets of samples, the best first: faults decide, and of equal ones the distance."""
        return self.excess, self.total

    @property
    def score(self) -> float:
        """The rank as one number, for a search: an excess of one allowance outweighs any usual distance."""
        return self.total + EXCESS_COST * self.excess


def distance(own: SetFigures, human: SetFigures, scales: Mapping[str, float], weights: Weights = BALANCED) -> Distance:
    """Return how far samples are from people's texts, with `scales` from `human_scales` of these.

    The distance is 0 if the figures are equal; other texts by the same people are mostly nearer than the sum of the
    weights. Both sides should have the same number of samples, for the same prompts, cut at the same length, because
    figures depend on that. Raises `UserError`, naming the term, for a figure or a scale that is not a finite number, or
    that has no logarithm.
    """
    here, there = _coordinates(own, "own"), _coordinates(human, "human")
    terms, excesses, too_tame, too_wild = {}, {}, [], []
    for name, place in here.items():
        scale = scales.get(name, math.nan)
        if not 0 < scale < math.inf:
            raise UserError(f"distance: the scale of {name} is {scale}, must be a number above 0")
        gap = place - there[name]
        if name in FAULTS:
            above = -gap if name in BETTER_ABOVE else gap
            excesses[name] = max(0.0, above / scale - 1)
            continue
        term = terms[name] = getattr(weights, name) * abs(gap) / scale
        is_tame = gap > 0 if name in TAME_ABOVE else gap < 0
        is_neither = name not in TAME_ABOVE + TAME_BELOW
        if is_tame or is_neither:
            too_tame.append(term)
        if not is_tame or is_neither:
            too_wild.append(term)
    if own.mean_tokens == 0:
        excesses["empty_share"] = EMPTY_EXCESS
    return Distance(
        math.fsum(terms.values()),
        terms,
        math.fsum(too_tame),
        math.fsum(too_wild),
        math.fsum(excesses.values()),
        excesses,
    )


def human_scales(human: SetFigures, without: Sequence[SetFigures]) -> dict[str, float]:
    """Return the scale of each term, from the figures of all texts of people and those `without` each text in turn.

    The scale of a fault is its allowance: what people's own figure may be off by chance, with 95 % confidence, or the
    least of `FAULTS` if that is more. Raises `UserError` for fewer than two texts, and as `distance` does.
    """
    rows = [_coordinates(scores, "human") for scores in without]
    places = _coordinates(human, "human")
    names = list(places)
    columns = np.array([[row[name] for name in names] for row in rows])
    scales = {}
    for name, error, reach in zip(
        names, jackknife_error(columns).tolist(), jackknife_reach(columns).tolist(), strict=True
    ):
        if name in FAULTS:
            scales[name] = max(reach, FAULTS[name] or 1 / len(rows))
        else:
            tenth = SHARE_OF_HUMAN * (1 if name in LOGARITHMS else abs(places[name]))
            scales[name] = max(error, tenth, LEAST_SCALE)
    return scales


def _coordinates(scores: SetFigures, side: str) -> dict[str, float]:
    """Return each fault and each term of the distance that is not None, on the axis on which differences are taken."""
    places = {}
    for name in (*TERMS, *FAULTS):
        value = getattr(scores, name)
        if value is None:
            continue
        if not math.isfinite(value):
            raise UserError(f"distance: {name} of the {side} samples is {value}, must be a finite number")
        if LOGARITHMS.get(name) is math.log and value <= 0:
            raise UserError(f"distance: {name} of the {side} samples is {value}, must be above 0")
        places[name] = LOGARITHMS[name](value) if name in LOGARITHMS else value
    return places
