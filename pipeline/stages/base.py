"""Lay out the model to be fine-tuned: a GPT-2 from a folder or the hub, or a small new one, checked and in float32."""

import argparse
import re
import sys
from pathlib import Path

import requests
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from pipeline.checkpoint import WEIGHTS_FILE, WEIGHTS_INDEX_FILE, check_checkpoint, load_checkpoint, save_model
from pipeline.errors import UserError, report_errors
from pipeline.files import read_jsonl, whole_folder, write_json
from pipeline.params.base import BaseParams, ScratchParams
from pipeline.params.file import load_section
from pipeline.stage_process import stage_process
from pipeline.tokens import (
    END_OF_TEXT,
    TOKENIZER_FILES,
    end_of_text_id,
    load_tokenizer,
    vocabulary_size,
)

SCRATCH = "scratch"
HUB_FILES = ("config.json", "generation_config.json", WEIGHTS_FILE, WEIGHTS_INDEX_FILE, "model-*.safetensors",
             *TOKENIZER_FILES)  # fmt: skip
"""What is fetched; a repository of GPT-2 holds its weights four times more, for other frameworks."""
HUB_TIMEOUT_S = 10
ADVICE = "download the model elsewhere and set base.source to its folder"
COMMIT = re.compile(r"[0-9a-f]{40}")
MINIMUM_MERGE_COUNT = 2
"""A pair that the texts hold only once is no pattern, and not merged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training_split", type=Path, help="the training split's documents, read from scratch only")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with report_errors(), stage_process(arguments.out):
        make_base(arguments.training_split, arguments.out, load_section("base", BaseParams))


def make_base(training_split: Path, out: Path, params: BaseParams) -> None:
    """Write to `out`: config, tokenizer, float32 weights, and `source.json`, which says where they come from.

    Raises `UserError` where the source is missing or no whole GPT-2; nothing is left under `out` then.
    """
    folder = find_source(params)
    with whole_folder(out) as partial:
        if folder is None:
            tokenizer = train_tokenizer(training_split, params.scratch)
            model = initialize_model(params.scratch, end_of_text=tokenizer.eos_token_id)
        else:
            model = load_checkpoint(folder, params.source)
            tokenizer = AutoTokenizer.from_pretrained(folder)
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
    """The folder that holds the source, fetched where it is on the hub; none for `scratch`. Raises `UserError`."""
    folder = Path(params.source)
    if params.source == SCRATCH or folder.is_dir():
        if params.revision is not None:
            raise UserError(
                f"base.revision: belongs to the id of a model on the hub, and base.source is {params.source}; "
                "set it to null"
            )
        return None if params.source == SCRATCH else folder
    try:
        validate_repo_id(params.source)
    except HFValidationError as error:
        raise UserError(
            f"base.source: there is no folder {params.source}, and it is not a model's id on the hub (owner/name)"
        ) from error
    if params.revision is None or not COMMIT.fullmatch(params.revision):
        raise UserError(
            f"base.revision: {params.source} is no folder here, so it is fetched from the hub, at a commit: "
            "give its full hash, 40 hexadecimal digits, from the history of the model's files there"
        )
    return fetch(params.source, params.revision)


def fetch(repository: str, revision: str) -> Path:
    """Bring a model's files at one commit from the hub into its cache. Raises `UserError` in one line.

    Where the hub does not deliver, what the cache holds of this very commit will do.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        # Asked first because snapshot_download itself waits for an answer without end.
        HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES)))
    except RevisionNotFoundError as error:
        raise UserError(f"base.revision: {repository} has no commit {revision} on the hub") from error
    except GatedRepoError as error:
        raise UserError(
            f"base.source: {repository} is gated: ask for access on its page and set HF_TOKEN, or {ADVICE}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"base.source: the hub has no model {repository}, or shows it only to those who may see it; "
            "check the name, and set HF_TOKEN for a private one"
        ) from error
    except OfflineModeIsEnabled:
        problem = "is not asked, as HF_HUB_OFFLINE is set"
    except (LocalEntryNotFoundError, requests.ConnectionError, requests.Timeout):
        problem = "cannot be reached"
    except HfHubHTTPError as error:
        problem = f"answers with an error ({error})".splitlines()[0]
    except (requests.RequestException, RuntimeError):
        # RuntimeError is what hf_xet raises when a transfer fails.
        problem = "broke off"
    folder = find_cached(repository, revision)
    if folder is None:
        raise UserError(f"base.source: {repository} is no folder here, and the hub {problem}; {ADVICE}")
    print(f"{repository}: the hub {problem}; reading commit {revision} from the cache", file=sys.stderr)
    return folder


def find_cached(repository: str, revision: str) -> Path | None:
    """The folder that the hub's cache holds of a commit; none where it lacks files, as after a broken transfer."""
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        check_checkpoint(folder, repository)
    except (LocalEntryNotFoundError, UserError):
        return None
    return folder


def fit_vocabulary(model: GPT2LMHeadModel, tokenizer: Tokenizer, name: str) -> None:
    """Make the tokenizer's end-of-text the model's. Raises `UserError` where the tokenizer has more tokens than it."""
    tokens = vocabulary_size(tokenizer)
    if tokens > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {tokens} tokens, the model {model.config.vocab_size}; "
            "take the tokenizer that the model was trained with"
        )
    end_of_text = end_of_text_id(tokenizer)
    if model.config.eos_token_id != end_of_text:
        print(f"{name}: end-of-text is token {end_of_text}, not {model.config.eos_token_id} as config.json said")
    model.config.bos_token_id = model.config.eos_token_id = end_of_text
    if model.generation_config is not None:
        model.generation_config.bos_token_id = model.generation_config.eos_token_id = end_of_text


def train_tokenizer(training_split: Path, params: ScratchParams) -> GPT2TokenizerFast:
    """Train GPT-2's kind of byte-level BPE on the split's texts. Raises `UserError` where they give too few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=params.vocabulary_size,
        min_frequency=MINIMUM_MERGE_COUNT,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((row["text"] for row in read_jsonl(training_split)), trainer)
    if (learned := tokenizer.get_vocab_size()) < params.vocabulary_size:
        raise UserError(
            f"base.scratch.vocabulary_size: {params.vocabulary_size} tokens cannot be learned from {training_split}, "
            f"which gives {learned}; set it to {learned} or less, or add text"
        )
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=params.context_length,
    )


def initialize_model(params: ScratchParams, end_of_text: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, drawn from the seed as GPT-2 was initialized (Radford et al., 2019, section 2.3)."""
    config = GPT2Config(
        vocab_size=params.vocabulary_size,
        n_positions=params.context_length,
        n_layer=params.layers,
        n_head=params.heads,
        n_embd=params.width,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        return GPT2LMHeadModel(config)


if __name__ == "__main__":
    main()
