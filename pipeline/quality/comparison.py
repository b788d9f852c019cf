"""Compare sets of samples with what people wrote after the same prompts: figures, distances and their intervals.

The figures of a set are computed from those of its samples, which are measured once. So it costs little to leave each
prompt out in turn, of the samples and of the people's texts, as the intervals need (`jackknife`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.quality.distance import BALANCED, Distance, SetFigures, Weights, distance, human_scales
from pipeline.quality.diversity import distinct_n
from pipeline.quality.faults import TextFaults, fault_rates
from pipeline.quality.jackknife import Interval, jackknife_interval, leave_each_out
from pipeline.quality.mauve import mauve_of_buckets, sort_in_buckets
from pipeline.quality.ngrams import TokenIds
from pipeline.quality.repetition import is_looping, rep_n
from pipeline.quality.self_bleu import self_bleu
from pipeline.quality.zipf import zipf_coefficient

SELF_BLEU_TOKENS = 4
"""The length of the longest n-gram of self-BLEU, as in Zhu et al. 2018."""
MAUVE_SEEDS = range(5)
"""The seeds of k-means over which MAUVE is averaged, because that of few texts moves with the seed."""


@dataclass(frozen=True, kw_only=True)
class SampleFigures:
    """The figures of one sample, or of one person's text."""

    token_ids: TokenIds
    """The tokens without the prompt."""
    rep: tuple[float, float, float]
    """`rep_n` for n of 2, 3 and 4."""
    faults: TextFaults
    copy_tokens: int
    """The length of the longest run that occurs verbatim in the training text."""
    looping: bool
    in_form: bool
    """Whether the prompt plus the sample matches the form of the data."""
    logprob: float
    """The natural log-probability of all its tokens together, under the base."""
    state: npt.NDArray[np.floating]
    """The feature for MAUVE, [width]."""


def measure_sample(
    token_ids: TokenIds,
    *,
    faults: TextFaults,
    copy_tokens: int,
    loop_ngram_tokens: int,
    loop_repeats: int,
    in_form: bool,
    logprob: float,
    state: npt.NDArray[np.floating],
) -> SampleFigures:
    """Measure one sample; `is_looping` explains the two parameters of loops."""
    return SampleFigures(
        token_ids=token_ids,
        rep=(rep_n(token_ids, 2), rep_n(token_ids, 3), rep_n(token_ids, 4)),
        faults=faults,
        copy_tokens=copy_tokens,
        looping=is_looping(token_ids, loop_ngram_tokens, loop_repeats),
        in_form=in_form,
        logprob=logprob,
        state=state,
    )


def measure_set(samples: Sequence[SampleFigures], *, with_form: bool = True) -> SetFigures:
    """Return the figures of a set, except MAUVE; without any token, its perplexity is 1.

    Unless `with_form`, the share of texts that have the form is None.
    """
    ids = [sample.token_ids for sample in samples]
    tokens = sum(map(len, ids))
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
        perplexity=math.exp(-math.fsum(sample.logprob for sample in samples) / max(1, tokens)),
        mean_tokens=tokens / len(samples),
        **asdict(fault_rates([sample.faults for sample in samples])),
        mean_copy_tokens=float(np.mean([sample.copy_tokens for sample in samples])),
        looping_share=float(np.mean([sample.looping for sample in samples])),
        form_share=float(np.mean([sample.in_form for sample in samples])) if with_form else None,
    )


@dataclass(frozen=True)
class Human:
    """People's texts, one per prompt, with which samples are compared."""

    samples: Sequence[SampleFigures]
    figures: SetFigures
    without: list[SetFigures]
    """The figures without each text in turn."""
    scales: dict[str, float]
    """The scales of the distance: see `human_scales`."""

    @property
    def has_form(self) -> bool:
        """Whether any of the texts has the form of the data. If not, the form is left out of all figures."""
        return self.figures.form_share is not None

    def first(self, count: int) -> "Human":
        """Return the texts of the first prompts only."""
        return measure_people(self.samples[:count])


def measure_people(samples: Sequence[SampleFigures]) -> Human:
    """Measure people's texts. Raises `UserError` if there are fewer than two, or they have no token at all."""
    if len(samples) < 2:
        raise UserError(
            f"{len(samples)} text of people is too little to compare samples with; use at least two documents "
            "(prepare.validation_share and prepare.test_share set how many a split has)"
        )
    if not any(len(sample.token_ids) for sample in samples):
        raise UserError(
            "people's texts: none of them has a token after its prompt; lower samples.prompt_words, or add longer texts"
        )
    measure = partial(measure_set, with_form=any(sample.in_form for sample in samples))
    figures, without = measure(samples), leave_each_out(samples, measure)
    return Human(samples, figures, without, human_scales(figures, without))


@dataclass(frozen=True)
class Comparison:
    """A set of samples compared with people's texts."""

    figures: SetFigures
    distance: Distance
    without: npt.NDArray[np.float64] | None
    """The distance without each prompt in turn, float64 [prompts]; None if compared without intervals."""

    def interval(self) -> Interval:
        """Return the range in which the distance could be with other prompts."""
        return jackknife_interval(self.distance.total, self._require_without())

    def difference(self, other: "Comparison") -> Interval:
        """Return how much farther from people this set is than another with the same prompts; below 0, it is nearer."""
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
    """Compare samples with what people wrote after the same prompts, in the same order.

    With `intervals`, each prompt is left out in turn. Raises `UserError` unless there are as many samples as people's
    texts.
    """
    if len(samples) != len(human.samples):
        raise UserError(
            f"{len(samples)} samples cannot be compared with {len(human.samples)} texts of people; "
            "give one of each per prompt"
        )
    states = [np.stack([sample.state for sample in side]) for side in (samples, human.samples)]
    mauve = float(np.mean([mauve_of_buckets(sort_in_buckets(*states, seed=seed)) for seed in MAUVE_SEEDS]))
    measure = partial(measure_set, with_form=human.has_form)
    figures = replace(measure(samples), mauve=mauve)
    without = None
    if intervals:
        pairs = zip(leave_each_out(samples, measure), human.without, strict=True)
        without = np.array([distance(own, theirs, human.scales, weights).total for own, theirs in pairs])
    return Comparison(figures, distance(figures, human.figures, human.scales, weights), without)
