"""Checkpoints: a GPT-2 as transformers reads it, its weights in one safetensors file."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.errors import UserError


def save_model(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write config and weights. Raises `UserError` where the disk is full."""
    with weights_written(folder):
        # One file, whatever its size: without this limit, save_pretrained cuts weights at 5 GB.
        model.save_pretrained(folder, max_shard_size=sys.maxsize)


@contextmanager
def weights_written(folder: Path) -> Iterator[None]:
    """Tell in one line that weights could not be written: safetensors' error is not the operating system's."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{folder}: weights cannot be written ({error}); free space on the disk") from error


def load_checkpoint(folder: Path) -> GPT2LMHeadModel:
    """The checkpoint in float32, ready to be asked. Raises `UserError` where a weight is NaN or infinite."""
    model: GPT2LMHeadModel = GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention_implementation(folder)
    ).eval()
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"{folder}: weight {name} holds NaN or infinity; fine-tune again, with a lower rate")
    return model


def attention_implementation(folder: Path) -> str:
    """`sdpa`, or `eager` where a config scales attention otherwise: transformers 4.57 leaves that out of its SDPA."""
    config = GPT2Config.from_pretrained(folder)
    return "sdpa" if config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx else "eager"
