"""Checkpoints: a GPT-2 in the layout of transformers, with its weights in one safetensors file."""

import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from pipeline.errors import UserError
from pipeline.files import read_json, whole_folder
from pipeline.tokens import TOKENIZER_FILE, TOKENIZER_FILES, load_tokenizer

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"


def save_model(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write config and weights. Raises `UserError` if the disk is full."""
    with explain_unwritten_weights(folder):
        # One file of any size: without this limit, save_pretrained splits weights at 5 GB.
        model.save_pretrained(folder, max_shard_size=sys.maxsize)


def write_checkpoint(model: GPT2LMHeadModel, *, tokenizer_of: Path, out: Path) -> None:
    """Write config and weights, and copy the tokenizer's files of another checkpoint next to them."""
    save_model(model, out)
    for file in tokenizer_of.iterdir():
        if file.name in TOKENIZER_FILES:
            shutil.copy(file, out)


def pack_checkpoint(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint in float16 with its tokenizer, half the size, to ship it as a base.

    Raises `UserError` if it is not a complete GPT-2, or a weight is out of float16's range.
    """
    model = load_checkpoint(checkpoint).half()
    if not_held := [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise UserError(f"{checkpoint}: weights are out of the range of float16: {_some(not_held)}; ship it as it is")
    with whole_folder(out) as partial:
        write_checkpoint(model, tokenizer_of=checkpoint, out=partial)


@contextmanager
def explain_unwritten_weights(folder: Path) -> Iterator[None]:
    """Report in one line that weights could not be written: safetensors does not raise the operating system's error."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{folder}: weights cannot be written ({error}); free space on the disk") from error


def check_checkpoint(folder: Path, name: str) -> None:
    """Raise `UserError`, starting with `name`, if a GPT-2's config, weights or tokenizer are missing."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{name}: holds no config.json; a checkpoint is a GPT-2 as save_pretrained writes it")
    try:
        config = read_json(config_file)
    except ValueError as error:
        raise UserError(f"{name}: config.json is not JSON: {error}; fetch it again") from error
    if (model_type := config.get("model_type")) != "gpt2":
        raise UserError(f"{name}: is a {model_type} model; the checkpoint must be of a GPT-2")
    if "quantization_config" in config:
        raise UserError(
            f"{name}: is quantized; use a checkpoint with plain weights, because export makes each precision from them"
        )
    if not (folder / WEIGHTS_FILE).is_file() and not (folder / WEIGHTS_INDEX_FILE).is_file():
        raise UserError(
            f"{name}: holds no {WEIGHTS_FILE}, and pickled weights are not read; convert them with python -c "
            "\"from transformers import GPT2LMHeadModel as M; M.from_pretrained('IN').save_pretrained('OUT')\""
        )
    if not (folder / TOKENIZER_FILE).is_file() and not all(
        (folder / file).is_file() for file in ("vocab.json", "merges.txt")
    ):
        raise UserError(f"{name}: holds no tokenizer: neither {TOKENIZER_FILE} nor vocab.json with merges.txt")
    if (folder / TOKENIZER_FILE).is_file():
        load_tokenizer(folder)


def load_checkpoint(folder: Path, name: str | None = None) -> GPT2LMHeadModel:
    """Load a checkpoint in float32 and evaluation mode.

    Raises `UserError`, starting with `name` or the folder, if a file is missing, it is not a GPT-2, or a weight is
    missing, has the wrong shape or is not finite.
    """
    name = name or str(folder)
    check_checkpoint(folder, name)
    model: GPT2LMHeadModel
    with _only_errors_logged():
        try:
            model, loading = GPT2LMHeadModel.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=attention_implementation(GPT2Config.from_pretrained(folder)),
                use_safetensors=True,
                output_loading_info=True,
                # Without it, a wrong shape is reported in many lines. It is an error anyway, below.
                ignore_mismatched_sizes=True,
            )
        except (SafetensorError, FileNotFoundError) as error:
            raise UserError(f"{name}: its weights are cut off or lack a file: {error}; fetch them again") from error
    if misshapen := sorted(loading["mismatched_keys"]):
        raise UserError(
            f"{name}: weights have another shape than config.json says: {_some(misshapen)}; fetch the model again"
        )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{name}: weights are missing: {_some(missing)}; fetch the model again")
    if not_finite := [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise UserError(f"{name}: weights hold NaN or infinity: {_some(not_finite)}; take another checkpoint")
    if unknown := sorted(loading["unexpected_keys"]):
        print(f"{name}: left out what a GPT2LMHeadModel does not have: {_some(unknown)}")
    return model.eval()


def attention_implementation(config: GPT2Config) -> str:
    """Return `sdpa`, or `eager` if the config scales attention differently: transformers 4.57 ignores that in SDPA."""
    return "sdpa" if config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx else "eager"


def attention_scale(config: GPT2Config, layer: int) -> float:
    """Return the factor of a layer's attention scores; a config may leave out the usual root, or divide by depth."""
    scale: float = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


@contextmanager
def _only_errors_logged() -> Iterator[None]:
    """Silence what `transformers` logs about odd weights: it is reported here, as an error or in one line."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _some(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown, rest = names[:3], len(names) - 3
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
