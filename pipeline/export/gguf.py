"""Write a GPT-2 as a GGUF file, which llama.cpp, Ollama and LM Studio load, and read its weights back.

The file follows llama.cpp: `src/models/gpt2.cpp` for the tensors, `src/llama-vocab.cpp` for the tokenizer, and
`conversion/base.py` for which tensors are rounded. A head that is tied to the embedding is not in the file; llama.cpp
then computes the logits with `token_embd.weight`.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel
from yaml import YAMLError

from pipeline.checkpoint import attention_scale
from pipeline.errors import UserError
from pipeline.export.build import shape_of, weights_of
from pipeline.files import read_json, whole_file
from pipeline.progress import progress
from pipeline.tokens import TOKENIZER_FILE, end_of_text_id, load_tokenizer

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
PRECISIONS = tuple(FILE_TYPES)
SUFFIX = ".gguf"
ARCHITECTURE = gguf.MODEL_ARCH.GPT2
POSITIONS = "position_embd.weight"
TABLES = ("token_embd.weight", "output.weight")
"""The embedding and the head. In q4_0 they are q8_0: a head of 4 bits would cost more than all layers, and llama.cpp's
own quantizer does not round it so far either."""


def check_target(file: Path, precision: str) -> None:
    """Raise `UserError` if this is no name of a GGUF file, or the precision is unknown."""
    if file.suffix != SUFFIX or file.is_dir():
        raise UserError(f"{file}: must be a file whose name ends in {SUFFIX}")
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}, of which a GGUF file has one")


def write_gguf(
    model: GPT2LMHeadModel, tokenizer_folder: Path, file: Path, precision: str, *, license_id: str | None = None
) -> None:
    """Write weights, hyperparameters and tokenizer; the model is named after the file.

    Memory holds one rounded tensor besides the model. Raises `UserError` if llama.cpp has no such GPT-2 or no such
    tokenizer, or a weight is out of the range of the precision.
    """
    check_target(file, precision)
    shape = shape_of(model.config)
    names = gguf.get_tensor_name_map(ARCHITECTURE, shape.layers)
    weights = {_name(names, name): weight for name, weight in weights_of(model).items()}
    kinds = {name: _kind_of(name, _stored(name, weight).shape, precision) for name, weight in weights.items()}
    with whole_file(file) as partial, closing(gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(file.stem)
        if license_id is not None:
            writer.add_license(license_id)
        writer.add_file_type(FILE_TYPES[precision])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(shape.context_length)
        writer.add_embedding_length(shape.width)
        writer.add_feed_forward_length(len(weights["blk.0.ffn_up.bias"]))
        writer.add_block_count(shape.layers)
        writer.add_head_count(shape.heads)
        writer.add_layer_norm_eps(shape.epsilon)
        _add_tokenizer(writer, tokenizer_folder, shape.vocabulary_size)
        for name, weight in weights.items():
            stored = _stored(name, weight)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[name]]
            writer.add_tensor_info(name, stored.shape, stored.dtype, stored.size // block * block_bytes, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in progress(weights.items(), description=precision, unit="tensor"):
            scaled = _scale_queries(name, weight, model.config)
            rounded = _rounded(name, _stored(name, scaled), kinds[name])
            try:
                writer.write_tensor_data(rounded)
            except OSError as error:
                # NumPy does not pass on the operating system's error.
                raise UserError(f"{file}: cannot be written ({error}); free space on the disk") from error
    _report_unrounded(file, kinds, precision)


def read_gguf(file: Path, config: GPT2Config) -> GPT2LMHeadModel:
    """Return the model in a file of `write_gguf`, its weights in float32; `config` is that of the checkpoint."""
    usual_scale = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    model = GPT2LMHeadModel(GPT2Config.from_dict(config.to_dict() | usual_scale)).eval()
    names = gguf.get_tensor_name_map(ARCHITECTURE, config.n_layer)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with torch.no_grad():
        for key, weight in model.named_parameters():
            name = _name(names, key)
            stored = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
            weight.copy_(torch.tensor(_stored(name, stored)))
    return model


def read_license(checkpoint: Path) -> str | None:
    """Return the licence in the model card of a checkpoint, or None if there is none."""
    try:
        found = gguf.Metadata.load_model_card(checkpoint).get("license")
    except YAMLError as error:
        raise UserError(f"{checkpoint / 'README.md'}: its header is not YAML; correct or remove it") from error
    return found if isinstance(found, str) else None


def _name(names: gguf.TensorNameMap, key: str) -> str:
    """Return what llama.cpp calls a weight of transformers."""
    stem, dot, kind = key.rpartition(".")
    return names[stem] + dot + kind


def _stored(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transpose linear layers: transformers stores those of GPT-2 as `[in, out]`, GGUF as `[out, in]`."""
    return weight if weight.ndim == 1 or name in (POSITIONS, *TABLES) else weight.T


def _scale_queries(name: str, weight: NDArray[np.float32], config: GPT2Config) -> NDArray[np.float32]:
    """Move what a config changes in the scale of attention into the queries: llama.cpp knows only the usual root."""
    if ".attn_qkv." not in name:
        return weight
    factor = attention_scale(config, int(name.split(".")[1])) / (config.n_embd // config.n_head) ** -0.5
    if factor == 1:
        return weight
    scaled = weight.copy()
    scaled[..., : config.n_embd] *= factor
    return scaled


def _kind_of(name: str, shape: tuple[int, ...], precision: str) -> Kind:
    """Return how a tensor is stored: vectors and positions in float32, rows that blocks do not divide in float16."""
    if precision == "f32" or len(shape) == 1 or name == POSITIONS:
        return Kind.F32
    kind = Kind[("q8_0" if precision == "q4_0" and name in TABLES else precision).upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else Kind.F16


def _rounded(name: str, weight: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        stored: NDArray[Any] = gguf.quants.quantize(np.ascontiguousarray(weight), kind)
        if not np.isfinite(gguf.quants.dequantize(stored, kind)).all():
            raise UserError(f"precision: {name} is out of the range of {kind.name.lower()}; use f32")
    return stored


def _report_unrounded(file: Path, kinds: dict[str, Kind], precision: str) -> None:
    """Print which tensors are in float16 because the blocks of the precision do not divide their rows."""
    odd = [name for name, kind in kinds.items() if kind == Kind.F16 and precision != "f16"]
    if odd:
        print(f"{file}: {len(odd)} tensors are in f16, because {precision} needs rows of a multiple of 32: {odd[0]}, …")


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary_size: int) -> None:
    content = read_json(folder / TOKENIZER_FILE)
    _check_tokenizer(folder / TOKENIZER_FILE, content)
    tokenizer = load_tokenizer(folder)
    added = tokenizer.get_added_tokens_decoder()
    tokens, kinds = [], []
    for token_id in range(vocabulary_size):
        token = tokenizer.id_to_token(token_id)
        # llama.cpp needs a text for every row of the embedding.
        tokens.append(f"[PAD{token_id}]" if token is None else token)
        if token is None:
            kinds.append(gguf.TokenType.UNUSED)
        elif token_id not in added:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            # In a text, the name of a control token is ordinary characters, and that of a user-defined one the token.
            is_special = added[token_id].special
            kinds.append(gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED)
    end_of_text = end_of_text_id(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    )
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)
    # A prompt is the beginning of a document, as in `prompt_ids`.
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _check_tokenizer(file: Path, content: dict[str, Any]) -> None:
    """Raise `UserError` if llama.cpp would split texts otherwise than this tokenizer."""
    model, split = content["model"], content.get("pre_tokenizer") or {}
    differences = {
        "its model is not BPE": model["type"] != "BPE",
        "it leaves out merges at random": bool(model.get("dropout")),
        "it marks the parts of words": bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")),
        "it takes whole words before merges": bool(model.get("ignore_merges")),
        "it changes characters first": content.get("normalizer") is not None,
        "it does not split texts as GPT-2's does": split.get("type") != "ByteLevel" or not split.get("use_regex", True),
        "it puts a space before a text": bool(split.get("add_prefix_space")),
        "its added tokens take spaces with them, or match only whole words": any(
            token.get(name) for token in content.get("added_tokens", []) for name in ("lstrip", "rstrip", "single_word")
        ),
    }
    if found := [difference for difference, is_there in differences.items() if is_there]:
        raise UserError(f"{file}: llama.cpp would read texts otherwise: {'; '.join(found)}")
