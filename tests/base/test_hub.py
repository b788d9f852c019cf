"""Models fetched from a hub that this machine serves, or found in its cache."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from base_stage import REPOSITORY, REVISION, params, run_stage_on_each, write_training_split
from hub_server import HubServer
from safetensors.torch import load_file

from pipeline.base.hub import ADVICE
from pipeline.files import read_json, sha256_file
from pipeline.stages.base import make_base


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    model_folder = tmp_path / "model"
    make_base(write_training_split(tmp_path), model_folder, params("scratch"))
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/model.safetensors", "README.md"):
        (model_folder / name).parent.mkdir(exist_ok=True)
        (model_folder / name).write_bytes(b"not to be fetched")
    with HubServer(model_folder, REPOSITORY, REVISION, gated="harbour/gated") as server:
        yield server


def test_a_commit_is_fetched_without_pickles_and_what_is_missing_is_an_error(hub: HubServer, tmp_path: Path) -> None:
    other = "f" * 40
    messages = run_stage_on_each(
        tmp_path,
        {
            "no_commit": (REPOSITORY, other),
            "no_repository": ("harbour/nothing", REVISION),
            "gated": (hub.gated, REVISION),
            "there": (REPOSITORY, REVISION),
        },
        HF_ENDPOINT=hub.url,
    )
    assert messages == {
        "no_commit": f"error: base.revision: {REPOSITORY} has no commit {other} on the hub\n",
        "no_repository": "error: base.source: the hub has no model harbour/nothing, or it is "
        "private; check the name, and set HF_TOKEN for a private model\n",
        "gated": f"error: base.source: {hub.gated} is gated: ask for access on its page and set HF_TOKEN, or "
        f"{ADVICE}\n",
        "there": "",
    }
    assert hub.fetched_files() == {
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    out = tmp_path / "there"
    assert sha256_file(out / "model.safetensors") == sha256_file(hub.folder / "model.safetensors")
    source = read_json(out / "source.json")
    assert (source["source"], source["revision"]) == (REPOSITORY, REVISION)


def test_pickled_weights_are_fetched_where_there_are_no_others(hub: HubServer, tmp_path: Path) -> None:
    weights = load_file(hub.folder / "model.safetensors")
    (hub.folder / "model.safetensors").unlink()
    torch.save(weights, hub.folder / "pytorch_model.bin")
    assert run_stage_on_each(tmp_path, {"there": (REPOSITORY, REVISION)}, HF_ENDPOINT=hub.url) == {"there": ""}
    assert "pytorch_model.bin" in hub.fetched_files()
    fetched = load_file(tmp_path / "there" / "model.safetensors")
    assert all(torch.equal(fetched[name], weights[name]) for name in weights)


@dataclass(frozen=True)
class Offline:
    """The output of a process that may not ask the hub: a folder per source, and the messages."""

    folder: Path
    messages: dict[str, str]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    folder = tmp_path_factory.mktemp("offline")
    fill_cache(folder)
    sources = {
        "scratch": ("scratch", None),
        "cached": (REPOSITORY, REVISION),
        "elsewhere": ("harbour/nothing", REVISION),
    }
    return Offline(folder, run_stage_on_each(folder, sources, HF_HUB_OFFLINE="1", PYTHONHASHSEED="5"))


def fill_cache(folder: Path) -> Path:
    """Put a model where the hub's cache keeps a commit."""
    cached = folder / "hub-cache" / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / REVISION
    make_base(write_training_split(folder), cached, params("scratch"))
    return cached


def test_offline_a_cached_commit_is_read_or_else_the_error_asks_for_a_folder(offline: Offline) -> None:
    problem = "was not asked because HF_HUB_OFFLINE is set"
    assert offline.messages == {
        "scratch": "",
        "cached": f"{REPOSITORY}: the hub {problem}; reading commit {REVISION} from the cache\n",
        "elsewhere": f"error: base.source: harbour/nothing is not a folder here, and the hub {problem}; {ADVICE}\n",
    }
    for name in ("model.safetensors", "tokenizer.json"):
        assert sha256_file(offline.folder / "cached" / name) == sha256_file(offline.folder / "scratch" / name)


def test_a_hub_that_refuses_is_an_error_even_if_the_cache_holds_half_the_commit(tmp_path: Path) -> None:
    (fill_cache(tmp_path) / "model.safetensors").unlink()
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{not_listening.getsockname()[1]}"
        messages = run_stage_on_each(tmp_path, {"half": (REPOSITORY, REVISION)}, HF_ENDPOINT=refusing)
    assert messages == {
        "half": f"error: base.source: {REPOSITORY} is not a folder here, and the hub cannot be reached; {ADVICE}\n"
    }
