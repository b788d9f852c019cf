"""Write a GPT-2 with random weights and a stand-in tokenizer; speed does not depend on what a model has learned."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from pipeline.errors import UserError
from pipeline.files import whole_folder
from pipeline.tokens import END_OF_TEXT


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    vocabulary_size: int
    context_length: int
    initializer_range: float


SHAPES = {
    "medium": Shape(24, 1024, 16, 50257, 1024, 0.08),
    "tiny": Shape(2, 64, 2, 512, 1024, 0.5),
}
"""Weights are larger than those of a fresh GPT-2, which repeats one token: so greedy tokens show wrong conversions."""
MASSIVE = {138: 3000.0, 378: -800.0}
"""What some channels of the residual stream are at the first position of a text."""
LASTING = {64: 30.0, 447: -20.0, 481: 15.0}
"""What some channels are at every position."""
FIRST_POSITION = 40.0
NEURON_GAIN, NEURON_BIAS, NEURON_OUTPUT = 10.0, -100.0, 56.0
SHARPNESS = 1.8
"""These make the neuron silent elsewhere, and leave the next token an entropy of about 4 nats."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--outliers", action="store_true", help="with massive activations, as trained GPT-2s have them")
    arguments = parser.parse_args()
    with whole_folder(arguments.out) as partial:
        write_checkpoint(partial, SHAPES[arguments.shape], outliers=arguments.outliers)


def write_checkpoint(folder: Path, shape: Shape, *, outliers: bool = False) -> None:
    """Write weights, config and tokenizer for `from_pretrained`; every call writes the same."""
    end_of_text = shape.vocabulary_size - 1
    config = GPT2Config(
        vocab_size=shape.vocabulary_size,
        n_positions=shape.context_length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        initializer_range=shape.initializer_range,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for name, weight in model.named_parameters():
        # Fresh biases are 0 and fresh scales are 1, so nothing would show whether they are applied. Large biases would
        # hide the prompt, because every layer adds the same ones at every position.
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float(name.endswith("weight")), std=shape.initializer_range / 5)
    if outliers:
        plant_outliers(model)
    model.save_pretrained(folder)
    tokenizer = stand_in_tokenizer(shape.vocabulary_size)
    GPT2TokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT).save_pretrained(folder)


@torch.no_grad()
def plant_outliers(model: GPT2LMHeadModel) -> None:
    """Give random weights the outliers that training makes.

    At the first position a neuron of the second layer makes thousands in two channels of the residual stream, as Sun
    et al. found it in GPT-2 (Massive Activations in Large Language Models, 2024, arXiv 2402.17762); at every position
    three channels are tens of times as large as the others, as Kovaleva et al. found it (BERT Busters, 2021, arXiv
    2105.06990). The logits are made as sharp as those of a trained model, which shows errors that flat ones hide.
    """
    width, body = model.config.n_embd, model.transformer
    direction = torch.nn.functional.normalize(torch.randn(width), dim=0)
    layer = body.h[min(1, len(body.h) - 1)]
    # After the normalization, only the first position lies in this direction by more than a few units.
    body.wpe.weight[0] += FIRST_POSITION * direction
    layer.mlp.c_fc.weight[:, 0] = NEURON_GAIN * direction
    layer.mlp.c_fc.bias[0] = NEURON_BIAS
    layer.mlp.c_proj.weight[0] = 0
    for channel, height in MASSIVE.items():
        layer.mlp.c_proj.weight[0, channel % width] = height / NEURON_OUTPUT
    for channel, height in LASTING.items():
        body.h[0].mlp.c_proj.bias[channel % width] = height
    body.ln_f.weight *= SHARPNESS


def stand_in_tokenizer(vocabulary_size: int) -> Tokenizer:
    """Return a byte-level BPE of this size: all bytes, as many pairs of bytes as needed, end-of-text as the last."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    count = vocabulary_size - len(characters) - 1
    merges = [(first, second) for first in characters for second in characters][:count]
    if not 0 <= count == len(merges):
        raise UserError(f"vocabulary_size: no pairs of bytes make {vocabulary_size} tokens")
    tokens = [*characters, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


if __name__ == "__main__":
    main()
