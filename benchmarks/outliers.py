"""Show what export does for a model with massive activations: which products it stores more exactly, and at what cost.

The model is a stand-in with random weights, in which outliers are planted as training makes them, unless `--checkpoint`
names another. It is compared with PyTorch on texts that it writes itself, with the tolerances of params.yaml.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from random_gpt2 import SHAPES, write_checkpoint
from report import publish, table
from transformers import GPT2LMHeadModel

from pipeline import machine
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import report_errors
from pipeline.export.build import build_engine
from pipeline.export.calibration import write_texts
from pipeline.export.certificate import certify
from pipeline.params.export import ExportParams
from pipeline.params.file import load_section
from pipeline.tokens import TokenArrays, end_of_text_id, load_tokenizer, tokenizer_sha256

TEXTS, TOKENS = 40, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint's folder, instead of random weights")
    parser.add_argument("--precisions", default="float32,int8,int4", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    with report_errors(), tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or Path(folder) / "checkpoint"
        if arguments.checkpoint is None:
            write_checkpoint(checkpoint, SHAPES[arguments.shape], outliers=True)
        params = load_section("export", ExportParams).model_copy(update={"precisions": arguments.precisions.split(",")})
        publish(report(checkpoint, Path(folder) / "engine", params), arguments.out)


def report(checkpoint: Path, engine: Path, params: ExportParams) -> str:
    model = load_checkpoint(checkpoint)
    # Others than those on which the engine is calibrated.
    texts = write_texts(model, end_of_text_id(load_tokenizer(checkpoint)), count=TEXTS, tokens=TOKENS, seed=1).numpy()
    build_engine(model, checkpoint, engine, params.precisions, cache_bits=params.cache_bits)
    arrays = as_split(texts, checkpoint, model)
    certificates = certify(model, engine, arrays, arrays, params)
    lines = [
        *(f"{name}: {value}" for name, value in machine.describe().items()),
        f"model: {checkpoint.name}, {model.config.n_layer} layers, width {model.config.n_embd}",
        *describe_residual(model, texts),
        "",
    ]
    rows = []
    for precision, found in certificates.items():
        for one in (*found.coarser, found):
            stored = one.record()
            forms = ", ".join(f"{count} of {form}" for form, count in stored.get("forms", {"floats": "all"}).items())
            rise = one.parity.perplexity_onnxruntime / one.parity.perplexity_pytorch - 1
            rows.append(
                [
                    precision,
                    forms,
                    str(stored.get("cache_bits", 32)),
                    f"{one.megabytes:,.1f}",
                    f"{one.parity.next_token_agreement:.1%}",
                    f"{one.parity.kl_divergence:.1e}",
                    f"{rise:+.2%}",
                    "broken" if one.broken else "kept",
                ]
            )
    header = ["precision", "forms of the products", "cache", "MB", "same token", "KL", "perplexity", "promises"]
    lines.append(table(header, rows))
    records = {precision: found.record() for precision, found in certificates.items()}
    return "\n".join([*lines, "", "parity.json", json.dumps(records, indent=2)]) + "\n"


def as_split(texts: NDArray[np.int64], checkpoint: Path, model: GPT2LMHeadModel) -> TokenArrays:
    end_of_text = int(texts[0, 0])
    return TokenArrays(
        tokens=np.append(texts.reshape(-1), end_of_text).astype(np.uint16),
        bounds=np.arange(0, texts.size + 1, texts.shape[1]),
        tokenizer_sha256=tokenizer_sha256(checkpoint),
        vocabulary_size=model.config.vocab_size,
        end_of_text_id=end_of_text,
        text_bytes=0,
        sha256="",
    )


@torch.inference_mode()
def describe_residual(model: GPT2LMHeadModel, texts: NDArray[np.int64]) -> list[str]:
    """Return how much larger the largest channels are than the median."""
    states = model(torch.from_numpy(texts[:8]), output_hidden_states=True, use_cache=False).hidden_states
    # The last has gone through a normalization.
    sizes = torch.stack(states[:-1]).abs()
    median = sizes.median()
    return [
        f"residual stream: at the first position up to {sizes[:, :, 0].max() / median:,.0f} times the median, "
        f"elsewhere up to {sizes[:, :, 1:].max() / median:,.0f} times"
    ]


if __name__ == "__main__":
    main()
