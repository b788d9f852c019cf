"""Export checkpoint and base to ONNX, and prove that the graph says what PyTorch says."""

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from optimum.exporters.onnx import main_export
from optimum.utils import logging as optimum_logging
from transformers import GPT2LMHeadModel, logging

from pipeline.checkpoint import load_checkpoint
from pipeline.engine.generator import Engine
from pipeline.engine.manifest import GRAPH_FILE, write_manifest
from pipeline.engine.parity import Parity, broken_promises, measure_parity
from pipeline.errors import UserError, reported
from pipeline.files import whole_folder, write_json
from pipeline.params import ParityParams, load_params
from pipeline.tokens import TOKENIZER_FILE, TokenArrays, end_of_text_id, load_tokenizer, load_tokens, tokenizer_sha256
from pipeline.training.packing import cut_windows

PRECISION = "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of the fine-tuned checkpoint")
    parser.add_argument("base", type=Path, help="folder of the base stage")
    parser.add_argument("tokens", type=Path, help="folder of the tokenize stage; its validation split is compared")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    optimum_logging.set_verbosity_error()
    with reported():
        export(arguments.checkpoint, arguments.base, arguments.tokens, arguments.out, load_params().export.parity)


def export(checkpoint: Path, base: Path, tokens: Path, out: Path, tolerance: ParityParams) -> None:
    """Write `portable/`, `engine/`, the same of the base under `base/`, and `parity.json`.

    Raises `UserError` naming the promise that broke; nothing is left under `out` then.
    """
    with whole_folder(out) as partial:
        export_checkpoint(checkpoint, partial)
        parity = certify(checkpoint, partial / "engine", tokens, tolerance)
        write_json(partial / "parity.json", asdict(parity))
        export_checkpoint(base, partial / "base")


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """The standard ONNX graph through Optimum in `portable/`, and the engine in `engine/`."""
    portable, engine = out / "portable", out / "engine"
    # The weights are checked first: a graph of NaNs exports without a word.
    model = load_checkpoint(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main_export(str(checkpoint), portable, task="text-generation-with-past", dtype="fp32", do_validation=False)
    (engine / PRECISION).mkdir(parents=True)
    for file in portable.glob(f"{GRAPH_FILE}*"):
        shutil.copy(file, engine / PRECISION)
    shutil.copy(checkpoint / TOKENIZER_FILE, engine)
    write_manifest(
        engine,
        context_length=model.config.n_positions,
        vocabulary_size=model.config.vocab_size,
        layers=model.config.n_layer,
        heads=model.config.n_head,
        width=model.config.n_embd,
        end_of_text_id=end_of_text_id(load_tokenizer(checkpoint)),
        precisions=(PRECISION,),
    )


def certify(checkpoint: Path, engine: Path, tokens: Path, tolerance: ParityParams) -> Parity:
    """Compare engine and PyTorch on real text. Raises `UserError` naming each promise that broke."""
    loaded = Engine.load(engine, provider="cpu")
    validation, train = (
        texts_of(load_tokens(tokens / split, tokenizer_sha256(checkpoint)), loaded.context_length)
        for split in ("validation", "train")
    )
    parity = measure_parity(
        loaded,
        TorchReference(load_checkpoint(checkpoint)),
        list(validation),
        train,
        positions=tolerance.positions,
        show_progress=sys.stderr.isatty(),
    )
    if broken := broken_promises(parity, tolerance):
        raise UserError(f"parity: {'; '.join(broken)}")
    return parity


def texts_of(arrays: TokenArrays, context_length: int) -> Iterator[list[int]]:
    """The documents of a split, each opening with end-of-text, cut where they exceed the context."""
    documents = (arrays.document(index) for index in range(len(arrays)))
    for document in documents:
        for window in cut_windows([len(document)], context_length):
            yield document[window.start : window.end].tolist()


class TorchReference:
    """The checkpoint in PyTorch, as `pipeline.engine.parity` asks for it."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(self.model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy())

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        output: list[int] = []
        fed, past = torch.tensor([list(ids)]), None
        with torch.inference_mode():
            while len(output) < new_tokens:
                step = self.model(fed, past_key_values=past, use_cache=True)
                past = step.past_key_values
                fed = step.logits[:, -1:].argmax(dim=-1)
                output.append(int(fed))
        return output


if __name__ == "__main__":
    main()
