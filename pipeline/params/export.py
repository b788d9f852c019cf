"""The section `export`: how the checkpoint becomes an engine."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Section


class ParityParams(Section):
    """How far an engine may differ from the PyTorch model in float32."""

    max_logit_difference: Annotated[float, Field(gt=0)]
    """The largest absolute difference of any logit: with empty and with real past, in a batch, with a cache."""
    min_next_token_agreement: Annotated[float, Field(gt=0, le=1)]
    """The smallest share of positions at which the likeliest next token is the same."""
    max_kl_divergence: Annotated[float, Field(gt=0)]
    """The largest KL divergence of the engine's distributions from PyTorch's, in nats, mean over the positions."""
    max_perplexity_rise: Annotated[float, Field(gt=0)]
    """The largest relative rise of the validation split's perplexity."""
    min_greedy_tokens: Annotated[int, Field(ge=0)]
    """The fewest tokens of a greedy continuation that are the same, of 64."""


class PrecisionsParityParams(Section):
    """The tolerances of each precision."""

    positions: Annotated[int, Field(ge=1000)]
    """The fewest positions of real text at which the two models are compared: all of the validation split, and text
    of the training split if that is too short."""
    float32: ParityParams
    float16: ParityParams
    int8: ParityParams
    int4: ParityParams
    int8_float16: ParityParams


class ExportParams(Section):
    """How the checkpoint becomes an engine."""

    precisions: Annotated[list[Literal["float32", "float16", "int8", "int4", "int8_float16"]], Field(min_length=1)]
    """The precisions that the engine holds; the first is evaluated, and runs by default."""
    cache_bits: Literal[8, 32]
    """The bits per number in the KV cache of int8 and int4; 8 take a quarter of the memory and less time to read. A
    precision that breaks its tolerances with 8 may get 32."""
    verbatim_index: bool
    """Whether the engine holds the training text with an index, 6 bytes per token, as `max_verbatim_tokens` needs."""
    parity: PrecisionsParityParams
