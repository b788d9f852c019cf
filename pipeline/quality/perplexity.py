"""How well a model predicts a text, and the windows in which a long text is scored."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError


def perplexity(logprobs: npt.NDArray[np.floating]) -> float:
    """Return exp(-mean) of the natural-log probabilities of the scored tokens.

    Comparable only between models with the same tokenizer. Raises `UserError` if no token was scored.
    """
    if logprobs.size == 0:
        raise UserError("perplexity: no token was scored; give at least one document that is not empty")
    with np.errstate(over="ignore"):
        return float(np.exp(-logprobs.mean(dtype=np.float64)))


def bits_per_byte(logprobs: npt.NDArray[np.floating], utf8_bytes: int) -> float:
    """Return the bits that the model needs per byte of the text: -sum(logprobs) / ln 2 / utf8_bytes.

    `logprobs` are the natural-log probabilities of every token of the texts and of the end-of-text that closes each,
    so that not knowing where a text ends costs bits; `utf8_bytes` is the length of the texts alone. Comparable between
    tokenizers (as in Gao et al. 2020, "The Pile"). Raises `UserError` if there is no byte.
    """
    if utf8_bytes == 0:
        raise UserError("bits per byte: the texts have no bytes; give at least one document that is not empty")
    return float(-logprobs.sum(dtype=np.float64)) / math.log(2) / utf8_bytes


class ScoringWindow(NamedTuple):
    """Tokens `start` to `end` (exclusive) of a document, to be fed; those from `first_scored` on are scored."""

    start: int
    end: int
    first_scored: int

    def select_scored(self, logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Select the scored ones from the log-probabilities of all its tokens but the first."""
        return logprobs[self.first_scored - self.start - 1 :]


def plan_windows(document_tokens: int, context_length: int, stride_tokens: int) -> list[ScoringWindow]:
    """Plan windows of at most `context_length` tokens that score each token but the first exactly once.

    `document_tokens` counts the opening end-of-text at index 0, which is context only. Each window begins
    `stride_tokens` after the one before, the last one less, and scores the tokens that the one before did not reach:
    from the second window on, a token is predicted from at least `context_length - stride_tokens` tokens. A document of
    one token has no window. Raises `UserError` unless `stride_tokens` is below `context_length`.
    """
    if stride_tokens >= context_length:
        raise UserError(
            f"evaluate.stride_tokens: {stride_tokens} is out of range, must be below the context length "
            f"({context_length})"
        )
    windows = []
    first_scored = 1
    end = min(document_tokens, context_length)
    while first_scored < document_tokens:
        windows.append(ScoringWindow(max(0, end - context_length), end, first_scored))
        first_scored, end = end, min(document_tokens, end + stride_tokens)
    return windows
