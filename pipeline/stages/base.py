"""Lay out the model to be fine-tuned: a GPT-2 from a folder or the hub, or a small new one, checked and in float32."""

import argparse
import os
import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2LMHeadModel

from pipeline.base.hub import fetch
from pipeline.base.scratch import initialize_model, train_tokenizer
from pipeline.checkpoint import load_plain, plain_checkpoint, save_model
from pipeline.errors import UserError, report_errors
from pipeline.files import whole_folder, write_json
from pipeline.params.base import BaseParams
from pipeline.params.file import load_section
from pipeline.quality.lexicon import load_lexicon, write_lexicon
from pipeline.stage_process import stage_process
from pipeline.tokens import end_of_text_id, load_tokenizer, vocabulary_size

SCRATCH = "scratch"
COMMIT = re.compile(r"[0-9a-f]{40}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training_split", type=Path, help="documents of the training split; only scratch reads them")
    parser.add_argument("out", type=Path, help="folder to write the model and its tokenizer to")
    arguments = parser.parse_args()
    with report_errors(), stage_process(arguments.out):
        make_base(arguments.training_split, arguments.out, load_section("base", BaseParams))


def make_base(training_split: Path, out: Path, params: BaseParams) -> None:
    """Write config, tokenizer, float32 weights, their origin as `source.json`, and a lexicon if it has one, to `out`.

    Raises `UserError` if the source is missing or not a complete GPT-2; `out` is not created then.
    """
    folder = find_source(params)
    with whole_folder(out) as partial:
        if folder is None:
            tokenizer = train_tokenizer(training_split, params.scratch)
            model = initialize_model(params.scratch, end_of_text=tokenizer.eos_token_id)
        else:
            with plain_checkpoint(folder, params.source) as plain:
                model = load_plain(plain, params.source)
                tokenizer = AutoTokenizer.from_pretrained(plain, split_special_tokens=params.split_special_tokens)
            if lexicon := load_lexicon(folder):
                write_lexicon(partial, lexicon)
        tokenizer.save_pretrained(partial)
        fit_vocabulary(model, load_tokenizer(partial), params.source)
        save_model(model, partial)
        parameters = model.num_parameters()
        write_json(
            partial / "source.json",
            {"source": params.source, "revision": params.revision, "parameters": parameters},
        )
    config = model.config
    print(f"{params.source}: {parameters:,} parameters, {config.vocab_size:,} tokens, context {config.n_positions:,}")


def find_source(params: BaseParams) -> Path | None:
    """Return the folder of the source, fetched if it is on the hub; None for `scratch`. Raises `UserError`."""
    folder = Path(os.path.expandvars(params.source)).expanduser()
    if params.source == SCRATCH or folder.is_dir():
        if params.revision is not None:
            raise UserError(
                f"base.revision: only a model on the hub has a revision, and base.source is {params.source}; "
                "set it to null"
            )
        return None if params.source == SCRATCH else folder
    try:
        validate_repo_id(params.source)
    except HFValidationError as error:
        raise UserError(
            f"base.source: there is no folder {params.source}, and it is not the id of a model on the hub (owner/name)"
        ) from error
    if params.revision is None or not COMMIT.fullmatch(params.revision):
        raise UserError(
            f"base.revision: {params.source} is not a folder here, so it is fetched from the hub at one commit: "
            "give its full hash, 40 hexadecimal digits, from the history of the model's files there"
        )
    return fetch(params.source, params.revision)


def fit_vocabulary(model: GPT2LMHeadModel, tokenizer: Tokenizer, name: str) -> None:
    """Make the tokenizer's end-of-text the model's. Raises `UserError` if the tokenizer has more tokens than it."""
    tokens = vocabulary_size(tokenizer)
    if tokens > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {tokens} tokens, the model {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    end_of_text = end_of_text_id(tokenizer)
    if model.config.eos_token_id != end_of_text:
        print(f"{name}: end-of-text is token {end_of_text}, not {model.config.eos_token_id} as in config.json")
    model.config.bos_token_id = model.config.eos_token_id = end_of_text
    if model.generation_config is not None:
        model.generation_config.bos_token_id = model.generation_config.eos_token_id = end_of_text


if __name__ == "__main__":
    main()
