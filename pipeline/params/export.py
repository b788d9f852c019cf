"""The section `export`: how the checkpoint becomes an engine."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Section


class ParityParams(Section):
    """What an engine has to keep of the PyTorch model in float32; the export fails where it does not."""

    max_logit_difference: Annotated[float, Field(gt=0)]
    """Largest absolute difference of any logit: with empty and with real past, in a batch, with a cache."""
    min_next_token_agreement: Annotated[float, Field(gt=0, le=1)]
    """Share of positions at which the likeliest next token is the same."""
    max_kl_divergence: Annotated[float, Field(gt=0)]
    """Of the engine's distributions from PyTorch's, in nats, mean over the positions."""
    max_perplexity_rise: Annotated[float, Field(gt=0)]
    """Of the validation split's perplexity, relative."""
    min_greedy_tokens: Annotated[int, Field(ge=0)]
    """Tokens of a greedy continuation that are the same, of 64."""


class PrecisionsParityParams(Section):
    """The tolerances of each precision."""

    positions: Annotated[int, Field(ge=1000)]
    """Positions of real text at which the two models' next tokens are compared at least: all of the validation split,
    and as much of the training split as it lacks."""
    float32: ParityParams
    float16: ParityParams
    int8: ParityParams
    int4: ParityParams
    int8_float16: ParityParams


class ExportParams(Section):
    """How the checkpoint becomes an engine."""

    precisions: Annotated[list[Literal["float32", "float16", "int8", "int4", "int8_float16"]], Field(min_length=1)]
    """What the engine holds; the first is what is evaluated, and what runs where nobody asks for another."""
    cache_bits: Literal[8, 32]
    """Of a number in the KV cache of int8 and int4; 8 take a quarter of the memory and less time to read."""
    verbatim_index: bool
    """Whether the engine holds its training text with an index, 6 bytes a token, which `max_verbatim_tokens` needs."""
    parity: PrecisionsParityParams
