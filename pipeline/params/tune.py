"""The section `tune`: how decoding parameters are searched for."""

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.decoding import SamplingParams
from pipeline.params.section import Count, Section, Seed


class RangeParams(Section):
    """The numbers from `low` to `high`, both of them tried, in steps."""

    low: float
    high: float
    step: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _check_order(self) -> "RangeParams":
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self

    def ends(self) -> list[float]:
        return [self.low, self.high]


Choices = Annotated[list[int], Field(min_length=1)]


class SpaceParams(Section):
    """What values each decoding parameter is tried with."""

    temperature: RangeParams
    top_k: Choices
    top_p: RangeParams
    min_p: RangeParams
    repetition_penalty: RangeParams
    presence_penalty: RangeParams
    no_repeat_ngram_size: Choices

    @model_validator(mode="after")
    def _check_values(self) -> "SpaceParams":
        for name, tried in self:
            for value in tried.ends() if isinstance(tried, RangeParams) else tried:
                SamplingParams.from_mapping({name: value})
        return self


class TuneParams(Section):
    """How decoding parameters are searched for, on the validation split."""

    trials: Count
    """Sets of parameters that are tried; half of their samples are drawn first, and the worse of them go no further."""
    finalists: Count
    """The best of them are drawn anew, with other random numbers, and the best of these is the winner."""
    seed: Seed
    """Of the search, and of the samples: the random numbers of sample i are keyed by it plus i."""
    samples: Annotated[int, Field(ge=2)]
    """Continuations of a trial, one a document, as far as there are documents."""
    max_new_tokens: Count
    """Of a continuation; people's texts are cut there too."""
    space: SpaceParams
