"""A tiny random GPT-2 with its tokenizer, as a checkpoint."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from pipeline.tokens import END_OF_TEXT, end_of_text_id, load_tokenizer, vocabulary_size

TINY_LEXICON = frozenset({"the", "lamp", "a", "cat"})
"""The known words of the tiny engine."""
SENTENCES = (
    "The lamp on Gull Rock went out before the morning came.",
    "The baker lit her second oven before the morning tide.",
    "Nobody on the rock had seen the lamp go out, and nobody said so.",
    "They say the tide brings back what the morning took.",
)
"""The texts from which the tokenizer learns its merges."""


def write_checkpoint(
    folder: Path, *, layers: int = 2, width: int = 32, heads: int = 2, context_length: int = 64, seed: int = 0
) -> Path:
    """Write the files that `from_pretrained` reads, with a vocabulary of 300 tokens, and return `folder`.

    Weights are far larger than a fresh GPT-2's: logits are well apart, so that a wrong position or mask shows.
    """
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    end_of_text = end_of_text_id(tokenizer)
    config = GPT2Config(
        vocab_size=vocabulary_size(tokenizer),
        n_positions=context_length,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        initializer_range=0.5,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        for name, weight in model.named_parameters():
            # Fresh biases are 0 and fresh scales 1, which would hide whether a graph adds and applies them.
            if weight.ndim == 1:
                torch.nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.2)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE with a few merges, as `transformers` does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    GPT2TokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT).save_pretrained(folder)
