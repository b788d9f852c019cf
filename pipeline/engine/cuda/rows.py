"""The state of a continuation that a device draws by itself: a row of each field that the sampler's kernel reads."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import filters
from pipeline.engine.sampler import OUTSIDE_THE_DRAW, Continuation

DEVICE_FIELDS = (OUTSIDE_THE_DRAW - {"logprobs"}) | {
    *("temperature", "top_k", "top_p", "min_p", "top_n_sigma", "eta_cutoff"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_new_tokens", "stop_token_ids"),
    *("logit_bias", "banned_token_ids", "allowed_token_ids"),
}
"""The fields of `SamplingParams` that the device supports. If any other is set, as a new one would be, the host draws.
N-grams that must not repeat and runs of the training text need the text itself, log-probabilities need the logits on
the host, and the kernel has no typical-p."""
ENDING_IDS = 8
"""The number of tokens that may end a continuation."""
LOGGED = 8
"""The number of tokens per row that the log holds. A token replaces the one drawn this many steps before."""
ASKS_HOST, STEP_BITS, TAG_BITS = (1 << 24) - 1, 24, 40
"""An entry of the log holds the token, or `ASKS_HOST` if the host must draw it; from bit `STEP_BITS` on, the number of
the draw since the row joined; and from bit `TAG_BITS` on, a tag, another one each time that a row joins. So a reader
can distinguish the token that it waits for from an older one in the same place."""
TAGS = 1 << (63 - TAG_BITS)
"""The number of tags that an entry has room for, after which they begin again. By then the log, which is emptied when a
row joins, has long forgotten the first."""
NEVER = -1
"""What no token has as its id, and no entry of the log as its value."""


def round_up_rows(rows: int) -> int:
    """Return how many rows a device runs for the first `rows`: the next power of two, as each is captured once."""
    return 1 << (rows - 1).bit_length()


@dataclass(frozen=True)
class Field:
    """An array of the state, `[rows, width]`."""

    dtype: type[np.generic]
    width: str
    """A key of `widths`."""


STATE: dict[str, Field] = {
    # What changes each token's logit: add the bias, apply the penalty, subtract the offset.
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
    "top_n_sigma": Field(np.float64, "one"),
    "eta_cutoff": Field(np.float64, "one"),
    "ending_ids": Field(np.int64, "endings"),
    "uniforms": Field(np.float64, "context"),
    # How many tokens were drawn, which is the index of the next uniform; how many may still be drawn.
    "drawn": Field(np.int64, "one"),
    "left": Field(np.int64, "one"),
    "tag": Field(np.int64, "one"),
    "log": Field(np.int64, "logged"),
    # The token that the model is fed next, and its position.
    "input_ids": Field(np.int64, "one"),
    "position_ids": Field(np.int64, "one"),
    "last_positions": Field(np.int32, "none"),
}
"""The fields in the order of `Rows` in `sampler.cu`. A `top_k`, `top_n_sigma` or `eta_cutoff` of 0, a `top_p` of 1 and
a `log_min_p` of `filters.LOWEST` filter nothing."""


def widths(vocabulary_size: int, context_length: int) -> dict[str, tuple[int, ...]]:
    """Return the dimensions that follow the rows in the shape of a field, by its width."""
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
    """Return the row of each field of `STATE`, with an empty log.

    `token_id` is fed next, at `position`, and up to `left` tokens are drawn; `tag` is added to the entries of the log.
    """
    params = continuation.params
    bias, penalty, offset, counts = continuation.expand_changes()
    greedy = params.temperature == 0
    endings = list(continuation.ending_ids)
    numbers = {
        "repetition_penalty": filters.penalty_factor(params.repetition_penalty),
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "temperature": 1 if greedy else filters.temperature_divisor(params.temperature),
        # Greedy takes the likeliest token, the first of several: the smallest uniform draws it from the top-1.
        "top_k": 1 if greedy else min(params.top_k, len(bias)),
        "top_p": 1 if greedy else params.top_p,
        "log_min_p": filters.LOWEST if greedy or params.min_p == 0 else math.log(params.min_p),
        "top_n_sigma": 0 if greedy else params.top_n_sigma,
        "eta_cutoff": 0 if greedy else params.eta_cutoff,
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
        "log": [NEVER] * LOGGED,
    }
    return {name: np.asarray(row[name], STATE[name].dtype) for name in row}
