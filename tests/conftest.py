"""The tiny GPT-2 of `tiny_gpt2.py` and its engine, made once per run, read by all tests and changed by none.

Imports are inside the fixtures: tests that ask for no model start without loading torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from shared_folder import check_unchanged, set_root, shared_folder
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from pipeline.engine import Engine

LONGEST = "test_end_to_end.py"

# No test depends on time: Hypothesis otherwise fails an example that takes over 200 ms, as on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file first, so that no worker still runs it when the others have finished."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(scope="session", autouse=True)
def shared_root(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """The place of the shared folders: the temporary folder of this run, which holds those of its workers."""
    own = tmp_path_factory.getbasetemp()
    set_root((own if worker_id == "master" else own.parent) / "shared")
    yield
    check_unchanged()


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """Folder of a random GPT-2 of 2 layers, width 32 and context 64, with its tokenizer. Do not write to it."""

    def build(folder: Path) -> None:
        from tiny_gpt2 import write_checkpoint

        write_checkpoint(folder)

    return shared_folder("tiny-checkpoint", build)


@pytest.fixture(scope="session")
def tiny_export_folder(tiny_checkpoint: Path) -> Path:
    """`portable/` and `engine/` of `tiny_checkpoint`. Do not write to it."""

    def build(folder: Path) -> None:
        from tiny_gpt2 import TINY_LEXICON

        from pipeline.export.build import CACHE_BITS, PRECISIONS
        from pipeline.stages.export import export_checkpoint

        export_checkpoint(tiny_checkpoint, folder, PRECISIONS, CACHE_BITS, lexicon=TINY_LEXICON)

    return shared_folder("tiny-export", build)


@pytest.fixture(scope="session")
def tiny_engine_folder(tiny_export_folder: Path) -> Path:
    """`tiny_checkpoint` as an engine in every precision, float32 the first. Do not write to it."""
    return tiny_export_folder / "engine"


@pytest.fixture(scope="session")
def tiny_engine(tiny_engine_folder: Path) -> "Engine":
    """That engine in float32 on one core of the processor."""
    from pipeline.engine import Engine

    return Engine.load(tiny_engine_folder, provider="cpu", threads=1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: more threads cost more than they save in such a small model."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model(tiny_checkpoint: Path, one_thread: None) -> "GPT2LMHeadModel":
    """`tiny_checkpoint` in PyTorch, in evaluation mode. Each test has its own, and may train or change it."""
    from pipeline.checkpoint import load_checkpoint

    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    """The tokenizer of `tiny_checkpoint`, as this project uses it. Do not change its settings."""
    from pipeline.tokens import load_tokenizer

    return load_tokenizer(tiny_checkpoint)
