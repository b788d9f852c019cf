"""Export checkpoint and base to ONNX, and check the graph against PyTorch."""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimum.exporters.onnx import main_export
from optimum.utils import logging as optimum_logging
from transformers import GPT2LMHeadModel, logging

from pipeline.checkpoint import load_plain, plain_checkpoint
from pipeline.engine.manifest import INDEX_FOLDER
from pipeline.errors import report_errors
from pipeline.export.build import build_engine, leave_out
from pipeline.export.certificate import certify
from pipeline.export.forms import Forms
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

    A precision of fewer bits that breaks a promise of parity gets more exact forms until it keeps all. If it cannot,
    it is left out of the engine, with a warning; `parity.json` says why, and which forms were taken. Raises `UserError`
    naming the promise if the first precision or float32 cannot keep it, and then leaves nothing in `out`.
    """
    train, validation = (load_tokens(tokens / split, tokenizer_sha256(checkpoint)) for split in ("train", "validation"))
    lexicon = load_lexicon(base)
    with whole_folder(out) as partial, temporary_folder(out, None) as temporary:
        index = temporary / INDEX_FOLDER if params.verbatim_index else None
        if index is not None:
            write_index(index, train.tokens, train.bounds)
            lexicon |= collect_words(train.texts(load_tokenizer(checkpoint)))
        model = export_checkpoint(checkpoint, partial, params.precisions, params.cache_bits, index, lexicon)
        certificates = certify(model, partial / "engine", validation, train, params)
        write_json(partial / "parity.json", {name: found.record() for name, found in certificates.items()})
        broken = [name for name, found in certificates.items() if found.broken]
        for warning in filter(None, (found.warning() for found in certificates.values())):
            print(f"warning: {warning}", file=sys.stderr)
        if broken:
            # This reads every file of the engine again, for its digest.
            leave_out(partial / "engine", broken)
        # `evaluate` compares the base with the model, in the precision that it evaluates, and so in the same forms.
        evaluated = params.precisions[0]
        forms: dict[str, Forms] = {evaluated: certificates[evaluated].forms}
        export_checkpoint(base, partial / "base", [evaluated], params.cache_bits, index, lexicon, forms)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    precisions: Sequence[str],
    cache_bits: int,
    index: Path | None = None,
    lexicon: Lexicon = EMPTY_LEXICON,
    forms: Mapping[str, Forms] | None = None,
) -> GPT2LMHeadModel:
    """Write the standard ONNX graph, made by Optimum, to `portable/`, and the engine to `engine/`; return the model."""
    # Optimum reads the folder itself, and would fill weights that it does not find by their names with random numbers.
    with plain_checkpoint(checkpoint) as plain, warnings.catch_warnings():
        # Loading checks the weights: a graph of NaNs would export without an error.
        model = load_plain(plain, str(checkpoint))
        build_engine(
            model, plain, out / "engine", precisions, cache_bits=cache_bits, forms=forms, index=index, lexicon=lexicon
        )
        warnings.simplefilter("ignore")
        main_export(str(plain), out / "portable", task="text-generation-with-past", dtype="fp32", do_validation=False)
    return model


if __name__ == "__main__":
    main()
