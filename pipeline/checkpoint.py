"""Checkpoints: a GPT-2 in the layout of transformers, with its weights in one safetensors file.

Other layouts are read as well: pickled weights, names with the prefixes of what a model was wrapped in, a vocabulary
that is padded, a tokenizer in `vocab.json` and `merges.txt`. `plain_checkpoint` converts them.
"""

import logging
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from pipeline.errors import UserError
from pipeline.files import read_json, whole_folder, write_json
from pipeline.tokens import TOKENIZER_FILE, TOKENIZER_FILES, load_tokenizer, vocabulary_size

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
WEIGHTS_FILES = (WEIGHTS_FILE, WEIGHTS_INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE)
"""The files of which a checkpoint has one; the first that it has is read."""
FOREIGN = {
    "ckpt.pt": "a checkpoint of nanoGPT, which has no tokenizer and transposed weights",
    "*.ckpt": "a checkpoint of Lightning",
    "hparams.json": "a checkpoint of OpenAI's TensorFlow code or gpt-2-simple",
    "tf_model.h5": "weights of TensorFlow",
    "flax_model.msgpack": "weights of Flax",
    "*.gguf": "a model of llama.cpp",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed, which its zero_to_fp32.py joins",
    "*.distcp": "a checkpoint of torch.distributed",
}
"""What other programs write, by a file that shows it."""
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module|base_model\.model|model)\."
)
"""The parts of weights' names that torch.compile, FSDP, DataParallel, PEFT and Lightning add; GPT-2 has none."""
_ADAPTER = re.compile(r"\.(base_layer|modules_to_save|lora_|ia3_|hada_|lokr_|oft_|vera_)")
"""The parts of weights' names that show an adapter which was not merged."""
_EMBEDDING = re.compile(r"(transformer\.)?wte\.weight|lm_head\.weight")


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
    with plain_checkpoint(checkpoint) as plain:
        model = load_plain(plain, str(checkpoint)).half()
        if not_held := [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
            raise UserError(
                f"{checkpoint}: weights are out of the range of float16: {_some(not_held)}; ship it as it is"
            )
        with whole_folder(out) as partial:
            write_checkpoint(model, tokenizer_of=plain, out=partial)


@contextmanager
def explain_unwritten_weights(folder: Path) -> Iterator[None]:
    """Report in one line that weights could not be written: safetensors does not raise the operating system's error."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{folder}: weights cannot be written ({error}); free space on the disk") from error


def check_checkpoint(folder: Path, name: str) -> None:
    """Raise `UserError`, starting with `name`, if a GPT-2's config, weights or tokenizer are missing."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{name}: holds a PEFT adapter, which is read only when merged into its base: load it with "
            "peft.AutoPeftModelForCausalLM, and save what merge_and_unload() returns, with the tokenizer"
        )
    config_file = folder / "config.json"
    _check_there(folder, name, config_file.name)
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
    _check_there(folder, name, *WEIGHTS_FILES)
    if not (folder / TOKENIZER_FILE).is_file() and not all(
        (folder / file).is_file() for file in ("vocab.json", "merges.txt")
    ):
        raise UserError(f"{name}: holds no tokenizer: neither {TOKENIZER_FILE} nor vocab.json with merges.txt")
    if (folder / TOKENIZER_FILE).is_file():
        load_tokenizer(folder)


def _check_there(folder: Path, name: str, *files: str) -> None:
    """Raise `UserError` if a checkpoint has none of these files, saying whose it is if that shows."""
    if any((folder / file).is_file() for file in files):
        return
    for pattern, what in FOREIGN.items():
        if found := next(folder.glob(pattern), None):
            raise UserError(
                f"{name}: holds {found.name}, {what}; convert it to a GPT-2 of transformers, with its tokenizer"
            )
    raise UserError(f"{name}: holds no {' or '.join(files)}; a checkpoint is a GPT-2 as save_pretrained writes it")


@contextmanager
def plain_checkpoint(folder: Path, name: str | None = None) -> Iterator[Path]:
    """Yield a folder with `tokenizer.json` and weights that `from_pretrained` finds by their names.

    It is the checkpoint's own if it is so already, else a converted copy. Raises `UserError` if that cannot be made.
    """
    name = name or str(folder)
    check_checkpoint(folder, name)
    try:
        weights = None if _is_plain(folder) else _read_weights(folder, name)
    except (SafetensorError, FileNotFoundError, KeyError, JSONDecodeError) as error:
        raise UserError(f"{name}: its weights are cut off or lack a file: {error}; fetch them again") from error
    if weights is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="pipeline-checkpoint-") as copy:
        plain = Path(copy)
        for file in folder.iterdir():
            if file.name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
                shutil.copy(file, plain)
        AutoTokenizer.from_pretrained(folder).save_pretrained(plain)
        weights = _cut_padding(_strip_wrappers(weights, name), plain, name)
        save_file(weights, plain / WEIGHTS_FILE, metadata={"format": "pt"})
        yield plain


def _is_plain(folder: Path) -> bool:
    """Return whether a checkpoint needs no conversion, without reading its weights."""
    files = _weight_files(folder)
    if not (folder / TOKENIZER_FILE).is_file() or not all(file.endswith(".safetensors") for file in files):
        return False
    size = vocabulary_size(load_tokenizer(folder))
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                is_padded = _EMBEDDING.fullmatch(name) and opened.get_slice(name).get_shape()[0] > size
                if is_padded or _WRAPPERS.search(name) or _ADAPTER.search(name):
                    return False
    return True


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files with weights: one, or the shards of an index; safetensors before pickles."""
    first = next(file for file in WEIGHTS_FILES if (folder / file).is_file())
    return sorted(set(read_json(folder / first)["weight_map"].values())) if first.endswith(".json") else [first]


def _read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Read all weights; of pickles only tensors, so that no code in them runs."""
    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        try:
            read = (
                load_file(folder / file)
                if file.endswith(".safetensors")
                else torch.load(folder / file, map_location="cpu", weights_only=True)
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as error:
            raise UserError(
                f"{name}: {file} is cut off, or holds more than tensors, which is not read because it could run code; "
                f"take a checkpoint with {WEIGHTS_FILE}"
            ) from error
        if not isinstance(read, dict) or not all(isinstance(weight, torch.Tensor) for weight in read.values()):
            raise UserError(f"{name}: {file} is not a table of tensors by name; save the model's state_dict() in it")
        weights |= read
    return weights


def _strip_wrappers(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the weights under the names of the model itself, each with memory of its own, as safetensors wants it."""
    if adapter := sorted(filter(_ADAPTER.search, weights)):
        raise UserError(
            f"{name}: holds an adapter of PEFT that was not merged: {_some(adapter)}; "
            "save what merge_and_unload() returns"
        )
    prefixes = sorted({match.group() for key in weights for match in _WRAPPERS.finditer(key)})
    plain = {
        _WRAPPERS.sub("", key): weight.detach().clone(memory_format=torch.contiguous_format)
        for key, weight in weights.items()
    }
    if len(plain) < len(weights):
        raise UserError(f"{name}: has weights both with and without {', '.join(prefixes)}; keep one of the two")
    if prefixes:
        print(f"{name}: read the weights without {', '.join(prefixes)} in their names")
    return plain


def _cut_padding(weights: dict[str, torch.Tensor], folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights without rows that belong to no token, and write the new size to the config in `folder`."""
    size = vocabulary_size(load_tokenizer(folder))
    padded = {key: len(weight) for key, weight in weights.items() if _EMBEDDING.fullmatch(key) and len(weight) > size}
    if not padded:
        return weights
    print(f"{name}: cut the vocabulary from {max(padded.values())} to the {size} tokens of the tokenizer")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"vocab_size": size})
    return {key: weight[:size].clone() if key in padded else weight for key, weight in weights.items()}


def load_checkpoint(folder: Path, name: str | None = None) -> GPT2LMHeadModel:
    """Load a checkpoint in float32 and evaluation mode.

    Raises `UserError`, starting with `name` or the folder, if a file is missing, it is not a GPT-2, or a weight is
    missing, has the wrong shape or is not finite.
    """
    name = name or str(folder)
    with plain_checkpoint(folder, name) as plain:
        return load_plain(plain, name)


def load_plain(folder: Path, name: str) -> GPT2LMHeadModel:
    """Load a folder of `plain_checkpoint` as `load_checkpoint` does."""
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
            f"{name}: weights have another shape than config.json says: {_some(misshapen)}; take the config.json that "
            "was saved with them"
        )
    unknown = sorted(loading["unexpected_keys"])
    if missing := sorted(loading["missing_keys"]):
        instead = f" (it has {_some(unknown)}, which no GPT-2 has)" if unknown else ""
        raise UserError(f"{name}: weights are missing: {_some(missing)}{instead}; take a checkpoint that has them all")
    if not_finite := [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise UserError(f"{name}: weights hold NaN or infinity: {_some(not_finite)}; take another checkpoint")
    if unknown:
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
