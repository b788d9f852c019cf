"""Export checkpoint and base to ONNX, and check the graph against PyTorch."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optimum.exporters.onnx import main_export
from optimum.utils import logging as optimum_logging
from transformers import GPT2LMHeadModel, logging

from pipeline.checkpoint import load_plain, plain_checkpoint
from pipeline.engine.generator import Engine
from pipeline.engine.manifest import INDEX_FOLDER
from pipeline.errors import UserError, report_errors
from pipeline.export.build import build_engine, leave_out
from pipeline.export.parity import broken_promises, measure_parity
from pipeline.export.reference import TorchReference, windows_of
from pipeline.export.verbatim import write_index
from pipeline.files import temporary_folder, whole_folder, write_json
from pipeline.params.export import ExportParams
from pipeline.params.file import load_section
from pipeline.quality.lexicon import EMPTY_LEXICON, Lexicon, collect_words, load_lexicon
from pipeline.stage_process import stage_process
from pipeline.tokens import load_tokenizer, load_tokens, tokenizer_sha256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of the fine-tuned checkpoint")
    parser.add_argument("base", type=Path, help="folder of the base stage")
    parser.add_argument("tokens", type=Path, help="folder of the tokenize stage, for parity and the index")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    optimum_logging.set_verbosity_error()
    with report_errors(), stage_process(arguments.out):
        export(
            arguments.checkpoint, arguments.base, arguments.tokens, arguments.out, load_section("export", ExportParams)
        )


def export(checkpoint: Path, base: Path, tokens: Path, out: Path, params: ExportParams) -> None:
    """Write `portable/`, `engine/`, the same of the base under `base/`, and `parity.json`.

    A precision after the first that breaks a promise is left out of the engine, with a warning; `parity.json` then
    says why. Raises `UserError` naming the promise if the first precision or float32 breaks one, and then leaves
    nothing in `out`.
    """
    train = load_tokens(tokens / "train", tokenizer_sha256(checkpoint))
    lexicon = load_lexicon(base)
    with whole_folder(out) as partial, temporary_folder(out, None) as temporary:
        index = temporary / INDEX_FOLDER if params.verbatim_index else None
        if index is not None:
            write_index(index, train.tokens, train.bounds)
            lexicon |= collect_words(train.texts(load_tokenizer(checkpoint)))
        model = export_checkpoint(checkpoint, partial, params.precisions, params.cache_bits, index, lexicon)
        parity = certify(model, partial / "engine", tokens, params)
        write_json(partial / "parity.json", parity)
        broken = {precision: found["left_out"] for precision, found in parity.items() if "left_out" in found}
        for precision, promises in broken.items():
            print(f"warning: {precision} is left out of the engine: {promises}", file=sys.stderr)
        if broken:
            # This reads every file of the engine again, for its digest.
            leave_out(partial / "engine", list(broken))
        # `evaluate` compares the base with the model, in the precision that it evaluates.
        export_checkpoint(base, partial / "base", params.precisions[:1], params.cache_bits, index, lexicon)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    precisions: Sequence[str],
    cache_bits: int,
    index: Path | None = None,
    lexicon: Lexicon = EMPTY_LEXICON,
) -> GPT2LMHeadModel:
    """Write the standard ONNX graph, made by Optimum, to `portable/`, and the engine to `engine/`; return the model."""
    # Optimum reads the folder itself, and would fill weights that it does not find by their names with random numbers.
    with plain_checkpoint(checkpoint) as plain, warnings.catch_warnings():
        # Loading checks the weights: a graph of NaNs would export without an error.
        model = load_plain(plain, str(checkpoint))
        build_engine(model, plain, out / "engine", precisions, cache_bits=cache_bits, index=index, lexicon=lexicon)
        warnings.simplefilter("ignore")
        main_export(str(plain), out / "portable", task="text-generation-with-past", dtype="fp32", do_validation=False)
    return model


def certify(model: GPT2LMHeadModel, engine: Path, tokens: Path, params: ExportParams) -> dict[str, dict[str, Any]]:
    """Compare each precision with the model in PyTorch on real text, and return the contents of `parity.json`.

    Those of a precision that must be left out hold, as `left_out`, the promises that it breaks. Raises `UserError` if
    the first precision, which runs by default, or float32 breaks one.
    """
    engines: dict[str, Engine] = {
        precision: Engine.load(engine, precision=precision, provider="cpu") for precision in params.precisions
    }
    context_length = engines[params.precisions[0]].context_length
    validation, train = (
        windows_of(load_tokens(tokens / split, tokenizer_sha256(engine)), context_length)
        for split in ("validation", "train")
    )
    parity = measure_parity(
        engines,
        TorchReference(model),
        list(validation),
        train,
        positions=params.parity.positions,
        show_progress=sys.stderr.isatty(),
    )
    broken = {
        precision: "; ".join(broken_promises(found, getattr(params.parity, precision)))
        for precision, found in parity.items()
    }
    needed = [f"{name}: {broken[name]}" for name in params.precisions if broken[name] and name in _needed(params)]
    if needed:
        raise UserError(
            f"parity: {'; '.join(needed)} (export.parity holds the tolerances; a precision that is too coarse for "
            "this model can follow another in export.precisions, or be left out)"
        )
    return {
        precision: asdict(found) | ({"left_out": broken[precision]} if broken[precision] else {})
        for precision, found in parity.items()
    }


def _needed(params: ExportParams) -> tuple[str, ...]:
    """Return the precisions without which there is no engine: the first, and float32, which any model keeps."""
    return (params.precisions[0], "float32")


if __name__ == "__main__":
    main()
