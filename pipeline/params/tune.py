"""The section `tune`: how decoding parameters are searched for."""

from decimal import Decimal
from typing import Annotated

from pydantic import Field, model_validator

from pipeline.decoding import SamplingParams
from pipeline.params.section import Count, Section, Seed


class RangeParams(Section):
    """The numbers from `low` to `high`, both included, in steps that divide the range."""

    low: float
    high: float
    step: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _check_order(self) -> "RangeParams":
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        if self.high not in self:
            last = self.high - float(self._steps_to(self.high) % 1) * self.step
            raise ValueError(
                f"steps of {self.step:g} from low {self.low:g} miss high {self.high:g}; "
                f"set high to {last:g} or {last + self.step:g}, or change step"
            )
        return self

    def __contains__(self, value: float) -> bool:
        """Return whether a search tries the value."""
        return self.low <= value <= self.high and self._steps_to(value) % 1 == 0

    def _steps_to(self, value: float) -> Decimal:
        # As the numbers are written: in binary, (1.1 - 0.6) / 0.05 is 10.000000000000002.
        return (Decimal(repr(value)) - Decimal(repr(self.low))) / Decimal(repr(self.step))

    def ends(self) -> list[float]:
        return [self.low, self.high]


Choices = Annotated[list[int], Field(min_length=1)]


class SpaceParams(Section):
    """The values to try for each decoding parameter."""

    temperature: RangeParams
    top_k: Choices
    top_p: RangeParams
    min_p: RangeParams
    top_n_sigma: Choices
    eta_cutoff: RangeParams
    repetition_penalty: RangeParams

    @model_validator(mode="after")
    def _check_values(self) -> "SpaceParams":
        for name, tried in self:
            for value in tried.ends() if isinstance(tried, RangeParams) else tried:
                SamplingParams.from_mapping({name: value})
        return self


class TuneParams(Section):
    """How decoding parameters are searched for, on the validation split."""

    trials: Count
    """The number of sets of parameters to try. Half of the samples of a set are drawn first; bad sets stop there."""
    finalists: Count
    """The number of best trials to draw again with other random numbers; the best of these is the winner."""
    seed: Seed
    """The seed of the search and of the samples: the random numbers of sample i are keyed by this seed plus i."""
    samples: Annotated[int, Field(ge=2)]
    """The most continuations per trial; there is one per document."""
    max_new_tokens: Count
    """The longest continuation, in tokens, if the context holds it; people's texts are cut there too."""
    space: SpaceParams
