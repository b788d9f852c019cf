"""The toy project, taken through the stages once per run.

Imports are inside the fixture: tests that ask for no model start without loading torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from shared_folder import shared_folder

if TYPE_CHECKING:
    from toy_project import Project


@pytest.fixture(scope="session")
def project(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> "Project":
    """This worker's copy of the project from `prepare` to `evaluate`: its own store, but do not write to its `out/`."""
    from toy_project import Project, copy_project, make_project

    def build(folder: Path) -> None:
        from pipeline.stages import evaluate, export, finetune, tokenize, tune

        project = make_project(folder, tiny_checkpoint)
        project.run(tokenize, "out/prepare", "out/base", "out/tokenize")
        project.run(finetune, "out/tokenize", "out/base", "out/finetune")
        project.run(export, "out/finetune/checkpoint", "out/base", "out/tokenize", "out/export")
        read = ("out/export", "out/prepare/validation.jsonl", "out/tokenize/train", "out/finetune")
        project.run(tune, *read, "out/tune")
        project.run(evaluate, "out/export", "out/prepare", "out/tokenize", "out/finetune", "out/tune", "out/evaluate")

    shared = Project(shared_folder("toy-project", build))
    return copy_project(shared, tmp_path_factory.mktemp("project") / "toy")
