"""GGUF files for llama.cpp, quantized by llama.cpp itself, as its users quantize them."""

import ctypes
from pathlib import Path

import gguf
import llama_cpp

from pipeline.checkpoint import load_plain, plain_checkpoint
from pipeline.errors import UserError
from pipeline.export.gguf import POSITIONS, write_gguf

FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def write_float32(checkpoint: Path, file: Path) -> None:
    with plain_checkpoint(checkpoint) as plain:
        write_gguf(load_plain(plain, str(checkpoint)), plain, file, "f32")


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
