"""An engine folder from a checkpoint: a graph a precision, the tokenizer, and what describes them."""

import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.engine.graph import QUANTIZATIONS, Floats, Shape, write_graph
from pipeline.engine.manifest import GRAPH_FILE, write_manifest
from pipeline.errors import UserError
from pipeline.files import whole_folder
from pipeline.tokens import TOKENIZER_FILE, end_of_text_id, load_tokenizer

PRECISIONS = ("float32", "float16", *QUANTIZATIONS)
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
"""Both names of the one that `FastGelu` computes."""


def build_engine(model: GPT2LMHeadModel, tokenizer_folder: Path, folder: Path, precisions: Sequence[str]) -> None:
    """Write the engine of a model, in float32 and ready to be asked, to `folder`.

    The first precision is the default. Raises `UserError` for a precision that is none, or a GPT-2 that is unlike
    OpenAI's in what the graph cannot say.
    """
    check_precisions(precisions)
    shape = shape_of(model.config)
    weights = weights_of(model)
    with whole_folder(folder) as partial:
        for precision in tqdm(precisions, desc="engine", unit="precision", disable=not sys.stderr.isatty()):
            (partial / precision).mkdir()
            write_graph(partial / precision, GRAPH_FILE, weights, shape, precision)
        shutil.copy(tokenizer_folder / TOKENIZER_FILE, partial)
        write_manifest(
            partial,
            context_length=shape.context_length,
            vocabulary_size=shape.vocabulary_size,
            layers=shape.layers,
            heads=shape.heads,
            width=shape.width,
            end_of_text_id=end_of_text_id(load_tokenizer(partial)),
            precisions=tuple(precisions),
        )


def check_precisions(precisions: Sequence[str]) -> None:
    """Raises `UserError` where one is unknown or stands there twice, or there is none."""
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UserError(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}")
    if not precisions or len(set(precisions)) < len(precisions):
        raise UserError(f"precision: expected some of {', '.join(PRECISIONS)}, each once, got {list(precisions)}")


def shape_of(config: GPT2Config) -> Shape:
    """What the graph needs of a config. Raises `UserError` where it asks for something that the graph cannot do."""
    if config.activation_function not in ACTIVATIONS:
        raise UserError(
            f"config.json: activation_function {config.activation_function!r} is not GPT-2's ({', '.join(ACTIVATIONS)})"
        )
    if config.add_cross_attention:
        raise UserError("config.json: add_cross_attention is set; the engine runs models of text alone")
    head_width = config.n_embd // config.n_head
    scale = 1 / math.sqrt(head_width) if config.scale_attn_weights else 1.0
    return Shape(
        context_length=config.n_positions,
        vocabulary_size=config.vocab_size,
        layers=config.n_layer,
        heads=config.n_head,
        width=config.n_embd,
        epsilon=config.layer_norm_epsilon,
        attention_scales=tuple(
            scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale for layer in range(config.n_layer)
        ),
    )


def weights_of(model: GPT2LMHeadModel) -> dict[str, Floats]:
    """The weights under their names in the graph; `lm_head.weight` only where it is not the token embedding."""
    state = model.state_dict()
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    return {
        name.removeprefix("transformer."): np.asarray(weight.detach().float().numpy())
        for name, weight in state.items()
        if not (tied and name == "lm_head.weight")
    }
