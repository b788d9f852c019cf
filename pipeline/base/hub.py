"""Fetch a model's files from the Hugging Face hub, or find them in its cache."""

import sys
from pathlib import Path

import requests
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from pipeline.checkpoint import PICKLE_FILE, PICKLE_INDEX_FILE, WEIGHTS_FILE, WEIGHTS_INDEX_FILE, check_checkpoint
from pipeline.errors import UserError
from pipeline.tokens import TOKENIZER_FILES

HUB_FILES = ("config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_FILES)
SAFE_WEIGHTS = (WEIGHTS_FILE, WEIGHTS_INDEX_FILE, "model-*.safetensors")
PICKLED_WEIGHTS = (PICKLE_FILE, PICKLE_INDEX_FILE, "pytorch_model-*.bin")
"""The weights to fetch if there are no safe ones; GPT-2's repository holds them four more times."""
HUB_TIMEOUT_S = 10
ADVICE = "download the model elsewhere and set base.source to its folder"


def fetch(repository: str, revision: str) -> Path:
    """Download a model's files at one commit into the hub's cache, and return their folder.

    If the hub does not deliver, the cached files of the same commit are used. Raises a one-line `UserError` if there
    are none.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        # Ask first, because snapshot_download itself waits for an answer without a limit.
        info = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S)
        names = {file.rfilename for file in info.siblings or ()}
        weights = PICKLED_WEIGHTS if names.isdisjoint(SAFE_WEIGHTS) else SAFE_WEIGHTS
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*HUB_FILES, *weights]))
    except RevisionNotFoundError as error:
        raise UserError(f"base.revision: {repository} has no commit {revision} on the hub") from error
    except GatedRepoError as error:
        raise UserError(
            f"base.source: {repository} is gated: ask for access on its page and set HF_TOKEN, or {ADVICE}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"base.source: the hub has no model {repository}, or it is private; "
            "check the name, and set HF_TOKEN for a private model"
        ) from error
    except OfflineModeIsEnabled:
        problem = "was not asked because HF_HUB_OFFLINE is set"
    except (LocalEntryNotFoundError, requests.ConnectionError, requests.Timeout):
        problem = "cannot be reached"
    except HfHubHTTPError as error:
        problem = f"answers with an error ({error})".splitlines()[0]
    except (requests.RequestException, RuntimeError):
        # hf_xet raises a RuntimeError when a transfer fails.
        problem = "broke off the transfer"
    folder = find_cached(repository, revision)
    if folder is None:
        raise UserError(f"base.source: {repository} is not a folder here, and the hub {problem}; {ADVICE}")
    print(f"{repository}: the hub {problem}; reading commit {revision} from the cache", file=sys.stderr)
    return folder


def find_cached(repository: str, revision: str) -> Path | None:
    """Return the folder of a commit in the hub's cache; None if files are missing, as after a broken transfer."""
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        check_checkpoint(folder, repository)
    except (LocalEntryNotFoundError, UserError):
        return None
    return folder
