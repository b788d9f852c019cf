"""Scoring documents: the loss of every token under a model, and what it says about the model."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import Engine
from pipeline.quality.perplexity import bits_per_byte, perplexity, plan_windows
from pipeline.tokens import TokenArrays

POSITION_BIN_TOKENS = 32


def score_documents(engine: Engine, tokens: TokenArrays, stride_tokens: int) -> list[NDArray[np.float64]]:
    """Return the negative log-likelihood, in nats, of each token of each document and of its closing end-of-text."""
    documents = [tokens.document(index) for index in range(len(tokens))]
    windows = [
        (index, window)
        for index, document in enumerate(documents)
        for window in plan_windows(len(document), engine.context_length, stride_tokens)
    ]
    scored = engine.score([documents[index][window.start : window.end].tolist() for index, window in windows])
    losses: list[list[NDArray[np.float64]]] = [[] for _ in documents]
    for (index, window), logprobs in zip(windows, scored, strict=True):
        losses[index].append(-window.select_scored(logprobs))
    return [np.concatenate(parts) for parts in losses]


def summarize_losses(losses: Sequence[NDArray[np.float64]], tokens: TokenArrays) -> dict[str, float]:
    """Return perplexity per token and bits per byte."""
    logprobs = -np.concatenate(losses)
    return {"perplexity": perplexity(logprobs), "bits_per_byte": bits_per_byte(logprobs, tokens.text_bytes)}


def loss_by_position(losses: Mapping[str, Sequence[NDArray[np.float64]]]) -> list[list[str]]:
    """Return a table of each model's mean loss by position in a document, in bins: it shows what context is worth."""
    longest = max(len(document) for documents in losses.values() for document in documents)
    table = [["position", *losses]]
    for start in range(0, longest, POSITION_BIN_TOKENS):
        means = [
            float(np.concatenate([own[start : start + POSITION_BIN_TOKENS] for own in documents]).mean())
            for documents in losses.values()
        ]
        table.append([str(start + POSITION_BIN_TOKENS // 2), *map(repr, means)])
    return table
