"""Build an engine folder from a checkpoint: a graph per precision, the tokenizer, and the manifest."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.checkpoint import attention_scale
from pipeline.engine.manifest import GRAPH_FILE, INDEX_FOLDER, Manifest, read_manifest, write_manifest
from pipeline.errors import UserError
from pipeline.export.calibration import Calibration, calibrate, input_moments
from pipeline.export.forms import CACHE, LADDERS, Forms, cache_bits_of, needs_calibration, needs_moments, usual_forms
from pipeline.export.graph import Floats, Shape, write_graph
from pipeline.files import whole_folder
from pipeline.progress import progress
from pipeline.quality.lexicon import EMPTY_LEXICON, Lexicon, write_lexicon
from pipeline.tokens import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, end_of_text_id, load_tokenizer

PRECISIONS = ("float32", "float16", *LADDERS)
CACHE_BITS = 8
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
"""The two names of the activation that `FastGelu` computes."""


def build_engine(
    model: GPT2LMHeadModel,
    tokenizer_folder: Path,
    folder: Path,
    precisions: Sequence[str],
    *,
    cache_bits: int = CACHE_BITS,
    forms: Mapping[str, Forms] | None = None,
    index: Path | None = None,
    lexicon: Lexicon = EMPTY_LEXICON,
) -> None:
    """Write the engine of a model, which is in float32 and in evaluation mode, to `folder`.

    The first precision is the default. `cache_bits`, 8 or 32, is the bits per number in the cache of `int8` and `int4`;
    the others keep floats. `forms` are those of precisions that do not have their usual ones. `index` is a folder
    with that of the training text, which `max_verbatim_tokens` needs; the words of `lexicon` are those that `best_of`
    does not take for invented. Raises `UserError` for an unknown precision, or a GPT-2 that the graph cannot express.
    """
    check_precisions(precisions)
    shape = shape_of(model.config)
    end_of_text = end_of_text_id(load_tokenizer(tokenizer_folder))
    stored = {name: (forms or {}).get(name) or usual_forms(name, shape.layers, cache_bits) for name in precisions}
    calibration = calibrate(model, end_of_text) if any(map(needs_calibration, stored.values())) else None
    with whole_folder(folder) as partial:
        for precision in progress(precisions, description="engine", unit="precision"):
            (partial / precision).mkdir()
            _write_precision(model, partial / precision, precision, stored[precision], calibration)
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
            cache_bits={name: cache_bits_of(name, own) for name, own in stored.items()},
        )
        write_manifest(partial, manifest)


def write_again(model: GPT2LMHeadModel, engine: Path, precision: str, forms: Forms, calibration: Calibration) -> None:
    """Write a precision of an engine of this model again, with other forms."""
    manifest = read_manifest(engine)
    with whole_folder(engine / precision) as partial:
        _write_precision(model, partial, precision, forms, calibration)
    bits = manifest.cache_bits | {precision: cache_bits_of(precision, forms)}
    write_manifest(engine, replace(manifest, cache_bits=bits))


def _write_precision(
    model: GPT2LMHeadModel, folder: Path, precision: str, forms: Forms, calibration: Calibration | None
) -> None:
    scales, moments = None, None
    if calibration is not None and forms.get(CACHE) is not None:
        scales = calibration.cache_scales
    if calibration is not None and needs_moments(forms):
        moments = input_moments(model, calibration.texts)
    write_graph(folder, GRAPH_FILE, weights_of(model), shape_of(model.config), precision, forms, scales, moments)


def leave_out(engine: Path, precisions: Sequence[str]) -> None:
    """Remove precisions from an engine."""
    manifest = read_manifest(engine)
    for precision in precisions:
        shutil.rmtree(engine / precision)
    kept = tuple(precision for precision in manifest.precisions if precision not in precisions)
    bits = {precision: manifest.cache_bits[precision] for precision in kept}
    write_manifest(engine, replace(manifest, precisions=kept, cache_bits=bits))


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


def weights_of(model: GPT2LMHeadModel) -> dict[str, Floats]:
    """Return the weights by their names in the graph; `lm_head.weight` only if it is not the token embedding."""
    state = model.state_dict()
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    return {
        name.removeprefix("transformer."): np.asarray(weight.detach().float().numpy())
        for name, weight in state.items()
        if not (tied and name == "lm_head.weight")
    }
