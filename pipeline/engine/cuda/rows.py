"""The state of a continuation that a device draws by itself: a row of each field that the sampler's kernel reads."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import filters
from pipeline.engine.sampler import OUTSIDE_THE_DRAW, Continuation

DEVICE_FIELDS = (OUTSIDE_THE_DRAW - {"logprobs"}) | {
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_new_tokens", "stop_token_ids"),
    *("logit_bias", "banned_token_ids", "allowed_token_ids"),
}
"""The fields of `SamplingParams` that the device supports. If any other is set, as a new one would be, the host draws.
The others that there are look at the text itself (n-grams that may not repeat, runs of the training text), read the
logits on the host (log-probabilities), or are not written for the device (typical-p)."""
ENDING_IDS = 8
"""Tokens that may end a continuation."""
LOGGED = 8
"""Tokens of a row that the log holds, each in the place of the one drawn so many steps before."""
ASKS_HOST, STEP_BITS, TAG_BITS = (1 << 24) - 1, 24, 40
"""An entry is the token, or `ASKS_HOST` where the host has to draw it, with the number of the draw since the row joined
in the bits from `STEP_BITS` on, and a tag, which grows each time that a row joins, in those from `TAG_BITS` on. So the
reader knows the token that it waits for from any that stood there before."""
NEVER = -1
"""An ending id that no token has."""
LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True)
class Field:
    """An array `[rows, width]`."""

    dtype: type[np.generic]
    width: str


STATE: dict[str, Field] = {
    # What each token of the vocabulary has done to it: logit + bias, then the penalty, then less the offset.
    "bias": Field(np.float32, "vocabulary"),
    "penalty": Field(np.float32, "vocabulary"),
    "offset": Field(np.float32, "vocabulary"),
    "counts": Field(np.float64, "vocabulary"),
    "repetition_penalty": Field(np.float32, "one"),
    "presence_penalty": Field(np.float64, "one"),
    "frequency_penalty": Field(np.float64, "one"),
    "temperature": Field(np.float32, "one"),
    "top_k": Field(np.int64, "one"),
    "top_p": Field(np.float64, "one"),
    "log_min_p": Field(np.float32, "one"),
    "ending_ids": Field(np.int64, "endings"),
    "uniforms": Field(np.float64, "context"),
    # How many were drawn, which is the uniform that comes next; how many may still be.
    "drawn": Field(np.int64, "one"),
    "left": Field(np.int64, "one"),
    "tag": Field(np.int64, "one"),
    "log": Field(np.int64, "logged"),
    # What the model is fed next, and where it stands.
    "input_ids": Field(np.int64, "one"),
    "position_ids": Field(np.int64, "one"),
    "last_positions": Field(np.int32, "none"),
}
"""In the order of `Rows` in `sampler.cu`; a `top_k` of 0, a `top_p` of 1, a `log_min_p` of `LOWEST` filter nothing."""


def widths(vocabulary_size: int, context_length: int) -> dict[str, tuple[int, ...]]:
    """What follows the rows in the shape of a field of each width."""
    return {
        "none": (),
        "one": (1,),
        "endings": (ENDING_IDS,),
        "context": (context_length,),
        "logged": (LOGGED,),
        "vocabulary": (vocabulary_size,),
    }


def can_be_drawn(continuation: Continuation) -> bool:
    """Return whether the device can draw the next token: a minimum length must have been reached."""
    return (
        continuation.active_fields <= DEVICE_FIELDS
        and len(continuation.output_ids) >= continuation.params.min_new_tokens
        and len(continuation.ending_ids) <= ENDING_IDS
    )


def row_of(
    continuation: Continuation, token_id: int, position: int, left: int, tag: int, context_length: int
) -> dict[str, NDArray[Any]]:
    """The row of each field of `STATE` but the log, where `token_id` is fed next, and `left` may be drawn.

    `position` is where the token stands, `tag` what is added to the entries of the log.
    """
    params = continuation.params
    bias, penalty, offset, counts = continuation.dense_changes()
    greedy = params.temperature == 0
    endings = list(continuation.ending_ids)
    numbers = {
        "repetition_penalty": filters.penalty_factor(params.repetition_penalty),
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "temperature": 1 if greedy else filters.cooling(params.temperature),
        # The likeliest token, the first among equals: what the smallest uniform draws of the largest logits.
        "top_k": 1 if greedy else params.top_k,
        "top_p": 1 if greedy else params.top_p,
        "log_min_p": LOWEST if greedy or params.min_p == 0 else math.log(params.min_p),
        "drawn": 0,
        "left": left,
        "tag": tag,
        "input_ids": token_id,
        "position_ids": position,
    }
    row: dict[str, Any] = {name: [value] for name, value in numbers.items()} | {
        "bias": bias,
        "penalty": penalty,
        "offset": offset,
        "counts": counts,
        "ending_ids": endings + [NEVER] * (ENDING_IDS - len(endings)),
        "uniforms": np.zeros(context_length) if greedy else continuation.uniforms(context_length),
        "last_positions": position,
    }
    return {name: np.asarray(row[name], STATE[name].dtype) for name in row}
