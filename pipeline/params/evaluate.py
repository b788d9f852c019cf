"""The section `evaluate`: what is measured on the test split."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.decoding import SamplingParams
from pipeline.params.section import Count, Section, Seed


def _check_decoding(decoding: SamplingParams) -> SamplingParams:
    if decoding.seed is not None:
        raise ValueError("seed: set evaluate.seed; a registered model draws a fresh seed for each call")
    if decoding.n != 1:
        raise ValueError(f"n: {decoding.n} is out of range, must be 1: evaluate takes one sample a prompt")
    if decoding.logprobs is not None:
        raise ValueError("logprobs: set it where you call the engine; evaluate reports none")
    return decoding


Decoding = Annotated[SamplingParams, BeforeValidator(SamplingParams.from_mapping), AfterValidator(_check_decoding)]


class EvaluateParams(Section):
    """What is measured on the test split."""

    stride_tokens: Count
    """A document longer than the context is scored in windows that move on by this many tokens."""
    samples: Annotated[int, Field(ge=2)]
    """Continuations of each model and decoding, one a document, as far as there are documents."""
    guard_tokens: Count | None
    """One more set of samples is drawn with this as `max_verbatim_tokens`, to show its effect; null leaves it out."""
    seed: Seed
    """The random numbers of sample i are keyed by this seed plus i."""
    decoding: Decoding
    """The hand-set decoding parameters. A registered model uses them where its caller sets nothing, but for those that
    `tune` found better values of."""
