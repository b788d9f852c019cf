"""A small new GPT-2: a tokenizer trained on the training split, and a model with random weights."""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from pipeline.errors import UserError
from pipeline.files import read_jsonl
from pipeline.params.base import ScratchParams
from pipeline.tokens import END_OF_TEXT

MINIMUM_MERGE_COUNT = 2
"""A pair that occurs only once in the texts is not a pattern, and is not merged."""


def train_tokenizer(training_split: Path, params: ScratchParams) -> GPT2TokenizerFast:
    """Train GPT-2's kind of byte-level BPE on the split's texts. Raises `UserError` if they yield too few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=params.vocabulary_size,
        min_frequency=MINIMUM_MERGE_COUNT,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((row["text"] for row in read_jsonl(training_split)), trainer)
    if (learned := tokenizer.get_vocab_size()) < params.vocabulary_size:
        raise UserError(
            f"base.scratch.vocabulary_size: {params.vocabulary_size} tokens cannot be learned from {training_split}, "
            f"which gives {learned}; set it to {learned} or less, or add text"
        )
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=params.context_length,
    )


def initialize_model(params: ScratchParams, end_of_text: int) -> GPT2LMHeadModel:
    """Make a GPT-2 with random weights, drawn from the seed as in Radford et al., 2019, section 2.3."""
    config = GPT2Config(
        vocab_size=params.vocabulary_size,
        n_positions=params.context_length,
        n_layer=params.layers,
        n_head=params.heads,
        n_embd=params.width,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        return GPT2LMHeadModel(config)
