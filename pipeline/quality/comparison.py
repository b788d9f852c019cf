"""Sets of samples beside what people wrote after the same prompts: their figures, and how far the distance may err.

A figure of a set is made of those of its samples, which are taken once: so it costs little to leave each prompt out in
turn, of the samples and of the people's texts, which is what the intervals are made of (`bootstrap.jackknife`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.quality.distance import BALANCED, Distance, SetFigures, Weights, distance, human_scales
from pipeline.quality.diversity import distinct_n
from pipeline.quality.jackknife import Interval, jackknife_interval, leave_each_out
from pipeline.quality.mauve import mauve_of_buckets, sort_in_buckets
from pipeline.quality.ngrams import TokenIds
from pipeline.quality.repetition import is_looping, rep_n
from pipeline.quality.self_bleu import self_bleu
from pipeline.quality.zipf import zipf_coefficient

SELF_BLEU_TOKENS = 4
"""Of the longest n-gram, as in Zhu et al. 2018."""
MAUVE_SEEDS = range(5)
"""MAUVE of few texts moves with the seed of k-means: the mean over these is taken."""


@dataclass(frozen=True, kw_only=True)
class SampleFigures:
    """A sample, or a person's text, with the figures of it alone."""

    token_ids: TokenIds
    """Without its prompt."""
    rep: tuple[float, float, float]
    """`rep_n` for n of 2, 3 and 4."""
    copy_tokens: int
    """Of the longest run that stands verbatim in the training text."""
    looping: bool
    in_form: bool
    """Whether the form of the data is found in it and its prompt."""
    logprob: float
    """Natural log-probability under the base, of all its tokens together."""
    state: npt.NDArray[np.floating]
    """Its feature for MAUVE, [width]."""


def measure_sample(
    token_ids: TokenIds,
    *,
    copy_tokens: int,
    loop_ngram_tokens: int,
    loop_repeats: int,
    in_form: bool,
    logprob: float,
    state: npt.NDArray[np.floating],
) -> SampleFigures:
    """Take the figures of a sample that are of it alone; `is_looping` says what the two parameters of loops are."""
    return SampleFigures(
        token_ids=token_ids,
        rep=(rep_n(token_ids, 2), rep_n(token_ids, 3), rep_n(token_ids, 4)),
        copy_tokens=copy_tokens,
        looping=is_looping(token_ids, loop_ngram_tokens, loop_repeats),
        in_form=in_form,
        logprob=logprob,
        state=state,
    )


def measure_set(samples: Sequence[SampleFigures]) -> SetFigures:
    """The figures of a set but MAUVE. Raises `UserError` where there is no token in all of it."""
    ids = [sample.token_ids for sample in samples]
    tokens = sum(map(len, ids))
    if tokens == 0:
        raise UserError("samples: none of them has a token; is max_new_tokens too small, or the split empty?")
    rep_2, rep_3, rep_4 = np.mean([sample.rep for sample in samples], axis=0).tolist()
    return SetFigures(
        rep_2=rep_2,
        rep_3=rep_3,
        rep_4=rep_4,
        distinct_1=distinct_n(ids, 1),
        distinct_2=distinct_n(ids, 2),
        distinct_3=distinct_n(ids, 3),
        zipf=zipf_coefficient(ids),
        self_bleu=self_bleu(ids, SELF_BLEU_TOKENS),
        perplexity=math.exp(-math.fsum(sample.logprob for sample in samples) / tokens),
        mean_tokens=tokens / len(samples),
        mean_copy_tokens=float(np.mean([sample.copy_tokens for sample in samples])),
        looping_share=float(np.mean([sample.looping for sample in samples])),
        form_share=float(np.mean([sample.in_form for sample in samples])),
    )


@dataclass(frozen=True)
class Human:
    """People's texts, one a prompt, to which samples are held."""

    samples: Sequence[SampleFigures]
    figures: SetFigures
    without: list[SetFigures]
    """The figures without each of the texts."""
    scales: dict[str, float]
    """Of the distance: see `human_scales`."""

    def first(self, count: int) -> "Human":
        """The texts of the first prompts alone."""
        return measure_people(self.samples[:count])


def measure_people(samples: Sequence[SampleFigures]) -> Human:
    """Take the figures of people's texts. Raises `UserError` for fewer than two of them."""
    if len(samples) < 2:
        raise UserError(
            f"{len(samples)} text of people is too little to compare samples with; take two documents at least "
            "(prepare.validation_share and prepare.test_share say how many a split has)"
        )
    figures, without = measure_set(samples), leave_each_out(samples, measure_set)
    return Human(samples, figures, without, human_scales(figures, without))


@dataclass(frozen=True)
class Comparison:
    """A set of samples beside people's texts."""

    figures: SetFigures
    distance: Distance
    without: npt.NDArray[np.float64] | None
    """The distance without each of the prompts, float64 [prompts], where it was asked for."""

    def interval(self) -> Interval:
        """Where the distance could lie with other prompts."""
        return jackknife_interval(self.distance.total, self._require_without())

    def difference(self, other: "Comparison") -> Interval:
        """How much farther off this set is than another of the same prompts; below 0, it is nearer."""
        return jackknife_interval(
            self.distance.total - other.distance.total, self._require_without() - other._require_without()
        )

    def _require_without(self) -> npt.NDArray[np.float64]:
        if self.without is None:
            raise ValueError("the set was compared without intervals")
        return self.without


def compare(
    samples: Sequence[SampleFigures], human: Human, *, weights: Weights = BALANCED, intervals: bool = False
) -> Comparison:
    """Hold samples to what people wrote after the same prompts, in the same order.

    With `intervals`, each prompt is left out in turn; MAUVE's buckets stay what they were with all of them: found anew,
    they would move by more than a text is worth. Raises `UserError` where there are not as many of both.
    """
    if len(samples) != len(human.samples):
        raise UserError(
            f"{len(samples)} samples stand against {len(human.samples)} texts of people; take one of both a prompt"
        )
    every = range(len(samples))
    states = [np.stack([sample.state for sample in side]) for side in (samples, human.samples)]
    buckets = [sort_in_buckets(*states, seed=seed) for seed in MAUVE_SEEDS]

    def measure_kept(kept: Sequence[int]) -> SetFigures:
        rows = np.array(kept)
        parts = [found._replace(own=found.own[rows], human=found.human[rows]) for found in buckets]
        own = measure_set([samples[index] for index in kept])
        return replace(own, mauve=float(np.mean([mauve_of_buckets(part) for part in parts])))

    own_figures = measure_kept(every)
    without = None
    if intervals:
        pairs = zip(leave_each_out(every, measure_kept), human.without, strict=True)
        without = np.array([distance(own, theirs, human.scales, weights).total for own, theirs in pairs])
    return Comparison(own_figures, distance(own_figures, human.figures, human.scales, weights), without)
