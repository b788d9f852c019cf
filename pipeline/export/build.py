"""Build an engine folder from a checkpoint: a graph per precision, the tokenizer, and the manifest."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.checkpoint import attention_scale
from pipeline.engine.manifest import CUDA_PRECISIONS, GRAPH_FILE, INDEX_FOLDER, Manifest, read_manifest, write_manifest
from pipeline.errors import UserError
from pipeline.export.attention import CacheScales
from pipeline.export.graph import QUANTIZATIONS, Floats, Shape, write_graph
from pipeline.files import whole_folder
from pipeline.progress import progress
from pipeline.quality.lexicon import EMPTY_LEXICON, Lexicon, write_lexicon
from pipeline.tokens import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, end_of_text_id, load_tokenizer

PRECISIONS = ("float32", "float16", *QUANTIZATIONS)
CACHE_BITS = 8
CALIBRATION_TEXTS, CALIBRATION_TOKENS = 16, 64
CACHE_HEADROOM = 1.1
"""The factor over the largest key or value seen; larger ones are clipped."""
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
"""The two names of the activation that `FastGelu` computes."""


def build_engine(
    model: GPT2LMHeadModel,
    tokenizer_folder: Path,
    folder: Path,
    precisions: Sequence[str],
    *,
    cache_bits: int = CACHE_BITS,
    index: Path | None = None,
    lexicon: Lexicon = EMPTY_LEXICON,
) -> None:
    """Write the engine of a model, which is in float32 and in evaluation mode, to `folder`.

    The first precision is the default. `cache_bits`, 8 or 32, is the bits per number in the cache of `int8` and `int4`;
    the others keep floats. `index` is a folder with that of the training text, which `max_verbatim_tokens` needs; the
    words of `lexicon` are those that `best_of` does not take for invented. Raises `UserError` for an unknown precision,
    or a GPT-2 that the graph cannot express.
    """
    check_precisions(precisions)
    shape = shape_of(model.config)
    weights = weights_of(model)
    end_of_text = end_of_text_id(load_tokenizer(tokenizer_folder))
    bits = {precision: _cache_bits(precision, cache_bits) for precision in precisions}
    scales = calibrate_cache(model, end_of_text) if 8 in bits.values() else None
    with whole_folder(folder) as partial:
        for precision in progress(precisions, description="engine", unit="precision"):
            (partial / precision).mkdir()
            cache_scales = scales if bits[precision] == 8 else None
            write_graph(partial / precision, GRAPH_FILE, weights, shape, precision, cache_scales)
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
            if (tokenizer_folder / name).is_file():
                shutil.copy(tokenizer_folder / name, partial)
        if index is not None:
            shutil.copytree(index, partial / INDEX_FOLDER)
        if lexicon:
            write_lexicon(partial, lexicon)
        manifest = Manifest(
            context_length=shape.context_length,
            vocabulary_size=shape.vocabulary_size,
            layers=shape.layers,
            heads=shape.heads,
            width=shape.width,
            end_of_text_id=end_of_text,
            precisions=tuple(precisions),
            cache_bits=bits,
        )
        write_manifest(partial, manifest)


def leave_out(engine: Path, precisions: Sequence[str]) -> None:
    """Remove precisions from an engine."""
    manifest = read_manifest(engine)
    for precision in precisions:
        shutil.rmtree(engine / precision)
    kept = tuple(precision for precision in manifest.precisions if precision not in precisions)
    bits = {precision: manifest.cache_bits[precision] for precision in kept}
    write_manifest(engine, replace(manifest, precisions=kept, cache_bits=bits))


def _cache_bits(precision: str, quantized: int) -> int:
    if precision in CUDA_PRECISIONS:
        return 16
    return quantized if precision in QUANTIZATIONS else 32


def check_precisions(precisions: Sequence[str]) -> None:
    """Raise `UserError` if a precision is unknown or given twice, or there are none."""
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UserError(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}")
    if not precisions or len(set(precisions)) < len(precisions):
        raise UserError(f"precision: expected some of {', '.join(PRECISIONS)}, each once, got {list(precisions)}")


def shape_of(config: GPT2Config) -> Shape:
    """Return what the graph needs of a config. Raises `UserError` if it asks for what the graph cannot do."""
    if config.activation_function not in ACTIVATIONS:
        raise UserError(
            f"config.json: activation_function {config.activation_function!r} is not GPT-2's ({', '.join(ACTIVATIONS)})"
        )
    if config.add_cross_attention:
        raise UserError("config.json: add_cross_attention is set; the engine runs only models without it")
    return Shape(
        context_length=config.n_positions,
        vocabulary_size=config.vocab_size,
        layers=config.n_layer,
        heads=config.n_head,
        width=config.n_embd,
        epsilon=config.layer_norm_epsilon,
        attention_scales=tuple(attention_scale(config, layer) for layer in range(config.n_layer)),
    )


def calibrate_cache(model: GPT2LMHeadModel, end_of_text: int) -> list[CacheScales]:
    """Measure the steps of an 8-bit cache, one per channel, on texts that the model itself writes.

    These are close to what it will read, and always available. They are also read joined into one text, so that later
    positions are seen.
    """
    start = torch.full((CALIBRATION_TEXTS, 1), end_of_text)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        texts = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            min_new_tokens=min(CALIBRATION_TOKENS, model.config.n_positions) - 1,
            max_new_tokens=min(CALIBRATION_TOKENS, model.config.n_positions) - 1,
            # No text ends early, so none is padded; with end-of-text as padding, transformers would warn.
            pad_token_id=(end_of_text + 1) % model.config.vocab_size,
            eos_token_id=end_of_text,
            use_cache=True,
        )
        readings = (texts, texts.reshape(1, -1)[:, : model.config.n_positions])
        caches = [model(reading, use_cache=True).past_key_values for reading in readings]
    return [
        CacheScales(*(_cache_steps([layer[part] for layer in layers]) for part in (0, 1)))
        for layers in zip(*caches, strict=True)
    ]


def _cache_steps(readings: Sequence[torch.Tensor]) -> Floats:
    """Return the step of each channel, `[heads, head width]`, from `[texts, heads, tokens, head width]` each."""
    largest = torch.stack([values.abs().amax(dim=(0, 2)) for values in readings]).amax(dim=0)
    return np.asarray(largest.numpy() * CACHE_HEADROOM / 127, np.float32)


def weights_of(model: GPT2LMHeadModel) -> dict[str, Floats]:
    """Return the weights by their names in the graph; `lm_head.weight` only if it is not the token embedding."""
    state = model.state_dict()
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    return {
        name.removeprefix("transformer."): np.asarray(weight.detach().float().numpy())
        for name, weight in state.items()
        if not (tied and name == "lm_head.weight")
    }
