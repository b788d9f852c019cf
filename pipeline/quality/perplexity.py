"""How well a model predicts a text, and how a long text is cut into windows for that."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError


def perplexity(logprobs: npt.NDArray[np.floating]) -> float:
    """exp(-mean) of the scored tokens' natural-log probabilities.

    Comparable between models with the same tokenizer only. Raises `UserError` where no token was scored.
    """
    if logprobs.size == 0:
        raise UserError("perplexity: no token was scored, give at least one document that is not empty")
    with np.errstate(over="ignore"):
        return float(np.exp(-logprobs.mean(dtype=np.float64)))


def bits_per_byte(logprobs: npt.NDArray[np.floating], utf8_bytes: int) -> float:
    """Bits that the model needs for a byte of the text: -sum(logprobs) / ln 2 / utf8_bytes.

    `logprobs` are the natural-log probabilities of every token of the texts and of the end-of-text that closes each,
    so that knowing where a text ends is paid for; `utf8_bytes` is the length of the texts alone. Comparable between
    tokenizers (as in Gao et al. 2020, "The Pile"). Raises `UserError` where there is no byte.
    """
    if utf8_bytes == 0:
        raise UserError("bits per byte: the texts hold no byte, give at least one document that is not empty")
    return float(-logprobs.sum(dtype=np.float64)) / math.log(2) / utf8_bytes


class ScoringWindow(NamedTuple):
    """Tokens `start` to `end` (exclusive) of a document are fed; those from `first_scored` on are scored."""

    start: int
    end: int
    first_scored: int

    def select_scored(self, logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Of the log-probabilities of its tokens but the first, those that are scored here."""
        return logprobs[self.first_scored - self.start - 1 :]


def plan_windows(document_tokens: int, context_length: int, stride_tokens: int) -> list[ScoringWindow]:
    """Windows of at most `context_length` tokens in which each token but the first is scored exactly once.

    `document_tokens` counts the opening end-of-text at index 0, which is context only. A window moves on by
    `stride_tokens`, the last one by what is left, and scores what the one before did not reach: from the second window
    on, a token is predicted from at least `context_length - stride_tokens` tokens. A document of one token has no
    window. Raises `UserError` unless `stride_tokens` is below `context_length`.
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
