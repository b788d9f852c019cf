"""The section `evaluate`: what is measured on the test split."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.decoding import SamplingParams
from pipeline.params.section import Count, Section, Seed


def _check_decoding(decoding: SamplingParams) -> SamplingParams:
    if decoding.seed is not None:
        raise ValueError("seed: set evaluate.seed; a registered model draws a fresh seed for each call")
    if decoding.n != 1:
        raise ValueError(f"n: {decoding.n} is out of range, must be 1: evaluate takes one sample per prompt")
    if decoding.logprobs is not None:
        raise ValueError("logprobs: set it where you call the engine; evaluate does not report them")
    return decoding


Decoding = Annotated[SamplingParams, BeforeValidator(SamplingParams.from_mapping), AfterValidator(_check_decoding)]


class EvaluateParams(Section):
    """What is measured on the test split."""

    stride_tokens: Count
    """The step, in tokens, between the windows in which a document longer than the context is scored."""
    samples: Annotated[int, Field(ge=2)]
    """The most continuations per model and decoding; there is one per document."""
    guard_tokens: Count | None
    """The `max_verbatim_tokens` of one more set of samples, drawn to show its effect; null leaves that set out."""
    seed: Seed
    """The random numbers of sample i are keyed by this seed plus i."""
    decoding: Decoding
    """The hand-set decoding parameters. A registered model uses them if its caller sets nothing, except for those with
    better values from `tune`."""
