"""The tiny GPT-2 of `tiny_gpt2.py`, made once a session, read by all tests and changed by none.

Imports stand inside the fixtures: tests that ask for no model start without loading torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from pipeline.engine import Engine

LONGEST = "test_end_to_end.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: where files are shared among processes, none is left waiting for it."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2 of 2 layers, width 32 and context 64, with its tokenizer. Do not write to it."""
    from tiny_gpt2 import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_export_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`portable/` and `engine/` of `tiny_checkpoint`. Do not write to it."""
    from pipeline.export.build import CACHE_BITS, PRECISIONS
    from pipeline.stages.export import export_checkpoint

    folder = tmp_path_factory.mktemp("export")
    export_checkpoint(tiny_checkpoint, folder, PRECISIONS, CACHE_BITS)
    return folder


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
    """PyTorch on one thread: more of them cost more than they save in so small a model."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model(tiny_checkpoint: Path, one_thread: None) -> "GPT2LMHeadModel":
    """`tiny_checkpoint` in PyTorch, ready to be asked; the test's own, to train or change."""
    from pipeline.checkpoint import load_checkpoint

    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    """The tokenizer of `tiny_checkpoint`, as this project uses it. Do not change its settings."""
    from pipeline.tokens import load_tokenizer

    return load_tokenizer(tiny_checkpoint)
