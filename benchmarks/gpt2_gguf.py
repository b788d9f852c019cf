"""Write a GPT-2 checkpoint as a GGUF file for llama.cpp, quantized by llama.cpp itself.

The format follows `src/models/gpt2.cpp` of llama.cpp for the tensors, `gguf/constants.py` for the names, and
`src/llama-vocab.cpp` for the tokenizer. The head is tied to the embedding, so the file has no `output.weight`;
llama.cpp then computes the logits with `token_embd.weight`, and its quantizer treats that as the head.
"""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.tokens import TOKENIZER_FILE, end_of_text_id, load_tokenizer

POSITIONS = "position_embd.weight"

FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}

TENSORS = {
    "wte.": "token_embd.",
    "wpe.": "position_embd.",
    "ln_f.": "output_norm.",
    "ln_1.": "attn_norm.",
    "attn.c_attn.": "attn_qkv.",
    "attn.c_proj.": "attn_output.",
    "ln_2.": "ffn_norm.",
    "mlp.c_fc.": "ffn_up.",
    "mlp.c_proj.": "ffn_down.",
}
"""Names in transformers and in GGUF, without the layer in front and `weight` or `bias` at the end."""


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Write the float32 weights, hyperparameters and tokenizer."""
    model = GPT2LMHeadModel.from_pretrained(checkpoint, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    add_tokenizer(writer, checkpoint, config.vocab_size)
    for name, tensor in model.transformer.state_dict().items():
        writer.add_tensor(gguf_name(name), as_stored(name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    layer = ""
    if name.startswith("h."):
        _, index, name = name.split(".", 2)
        layer = f"blk.{index}."
    stem, dot, kind = name.rpartition(".")
    return layer + TENSORS[stem + dot] + kind


def as_stored(name: str, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transpose linear layers: transformers stores those of GPT-2 as `[in, out]`, GGUF as `[out, in]`."""
    linear = tensor.ndim == 2 and not name.startswith(("wte.", "wpe."))
    return np.ascontiguousarray(tensor.T) if linear else tensor


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, vocabulary_size: int) -> None:
    tokenizer = load_tokenizer(checkpoint)
    special = set(tokenizer.get_added_tokens_decoder())
    tokens, types = [], []
    for token_id in range(vocabulary_size):
        token = tokenizer.id_to_token(token_id)
        # llama.cpp needs a text for every row of the embedding.
        tokens.append(f"[PAD{token_id}]" if token is None else token)
        kind = gguf.TokenType.CONTROL if token_id in special else gguf.TokenType.NORMAL
        types.append(gguf.TokenType.UNUSED if token is None else kind)
    merges = read_json(checkpoint / TOKENIZER_FILE)["model"]["merges"]
    end_of_text = end_of_text_id(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)


def quantize(float32: Path, file: Path, precision: str, threads: int) -> None:
    """Quantize like `llama-quantize` by default, head included: q8_0 throughout, or q4_0 with a head in q6_K."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[precision]
    params.nthread = threads
    if llama_cpp.llama_model_quantize(str(float32).encode(), str(file).encode(), ctypes.byref(params)) != 0:
        raise UserError(f"llama.cpp could not quantize to {precision}")


def weight_bytes(file: Path) -> int:
    """Return the bytes of all tensors but the position embeddings, of which a token reads one row."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors if tensor.name != POSITIONS)
