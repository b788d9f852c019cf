"""What rounding is fitted to: texts that a model writes itself, and what its cache and its products hold on them."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel

from pipeline.export.attention import CacheScales
from pipeline.export.forms import PARTS

TEXTS, TEXT_TOKENS = 16, 256
"""Longer texts make products of 4 bits more exact; more texts do not."""
CACHE_HEADROOM = 1.1
"""The factor over the largest key or value seen; larger ones are clipped."""

Moments = dict[str, NDArray[np.float32]]
"""The sum over tokens of the outer product of a product's input with itself, `[inputs, inputs]`, by its name."""


@dataclass(frozen=True)
class Calibration:
    """Texts that a model draws, int64 `[texts, tokens]`, and the steps of an 8-bit cache, layer by layer."""

    texts: torch.Tensor
    cache_scales: list[CacheScales]


def calibrate(model: GPT2LMHeadModel, end_of_text: int) -> Calibration:
    """Let a model write texts, and measure on them; equal models give equal results."""
    texts = write_texts(model, end_of_text)
    return Calibration(texts, scale_cache(model, texts))


def write_texts(
    model: GPT2LMHeadModel, end_of_text: int, *, count: int = TEXTS, tokens: int = TEXT_TOKENS, seed: int = 0
) -> torch.Tensor:
    """Return texts that a model draws, int64 `[count, tokens]`, each beginning with end-of-text.

    These are close to what it will read, and always available.
    """
    start = torch.full((count, 1), end_of_text)
    new_tokens = min(tokens, model.config.n_positions) - 1
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        texts: torch.Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            # No text ends early, so none is padded; with end-of-text as padding, transformers would warn.
            pad_token_id=(end_of_text + 1) % model.config.vocab_size,
            eos_token_id=end_of_text,
            use_cache=True,
        )
    return texts


def scale_cache(model: GPT2LMHeadModel, texts: torch.Tensor) -> list[CacheScales]:
    """Return the steps of an 8-bit cache, one per channel, from the largest keys and values of texts.

    Some of the texts are also read joined into one, so that later positions are seen.
    """
    joined = texts.reshape(1, -1)[:, : model.config.n_positions]
    largest: list[list[torch.Tensor]] = []
    with torch.inference_mode():
        for text in (*(own[None] for own in texts), joined):
            cache = model.transformer(text, use_cache=True).past_key_values
            found = [[values.abs().amax(dim=(0, 2)) for values in layer] for layer in cache]
            largest = [
                [torch.maximum(*pair) for pair in zip(*layers, strict=True)]
                for layers in zip(largest or found, found, strict=True)
            ]
    return [CacheScales(*(np.asarray(part.numpy() * CACHE_HEADROOM / 127, np.float32) for part in own))
            for own in largest]  # fmt: skip


@torch.inference_mode()
def input_moments(model: GPT2LMHeadModel, texts: torch.Tensor) -> Iterator[Moments]:
    """Yield the moments of the inputs of a layer's products, layer by layer, so that memory holds one layer's."""
    body = model.transformer
    hidden = body.wte(texts) + body.wpe(torch.arange(texts.shape[1]))
    for number, layer in enumerate(body.h):
        found: Moments = {}
        with ExitStack() as hooks:
            for part in PARTS:
                record = partial(_record, found, f"h.{number}.{part}")
                hooks.callback(layer.get_submodule(part).register_forward_pre_hook(record).remove)
            hidden = layer(hidden)[0]
        yield found


def _record(found: Moments, name: str, _module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    flat = inputs[0].flatten(0, -2)
    found[name] = np.asarray((flat.T @ flat).numpy())
