"""A toy project: how to make and copy it, and how to take it through the stages."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from changed_params import ROOT, write_changed_params
from isolated_store import STORE, VARIABLES, add_empty_store, copy_store, isolated_store

from pipeline.files import write_jsonl
from pipeline.params.section import PARAMS_FILE
from pipeline.params.whole import Params, load_params
from pipeline.tracking.runs import find_run
from pipeline.tracking.store import connect

TEXTS = {
    "train": [f"The lamp on rock {number} went out before the tide." for number in range(60)],
    "validation": [f"The baker lit oven {number} before the morning." for number in range(8)],
    "test": [
        "The lamp went out — nobody said so.",
        "They say the tide brings back what the morning took.",
        "Nobody on the rock had seen the lamp go out. " * 8,
    ],
}
"""The documents of each split. The last test document is longer than the tiny model's context of 64 tokens."""
CHANGES: dict[str, Any] = {
    "finetune": {
        "batch_tokens": 128,
        "epochs": 2,
        "evaluations": 2,
        "learning_rate": 0.001,
        "samples": {"prompts": ["", "The lamp"], "max_new_tokens": 8},
    },
    # Rounding weights to 8 bits shows in so small a model with so large weights.
    "export": {
        "parity": {
            "positions": 1000,
            "int8": {
                "max_logit_difference": 8.0,
                "min_next_token_agreement": 0.5,
                "max_kl_divergence": 1.0,
                "max_perplexity_rise": 1.0,
            },
        }
    },
    "tune": {"trials": 8, "finalists": 2, "samples": 10, "max_new_tokens": 8},
    "samples": {"prompt_words": 3},
    "evaluate": {"stride_tokens": 32, "samples": 5, "decoding": {"max_new_tokens": 12}},
}


@dataclass(frozen=True)
class Project:
    """A project's folder, with its embedded MLflow store and the outputs of its stages under `out/`."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def params(self) -> Params:
        return load_params(self.root / PARAMS_FILE)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the folder the current one, as it is for every stage."""
        with isolated_store(self.root):
            yield

    def run_of(self, stage: str) -> str:
        """Return the id of the run that wrote the stage's outputs. Call it in `entered`."""
        found = find_run(connect(), stage, self.out / stage)
        assert found is not None
        return found

    def run(self, stage: ModuleType, *paths: str) -> None:
        """Run a stage as its command does."""
        with self.entered(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["stage", *paths])
            stage.main()


def make_project(root: Path, base: Path) -> Project:
    """Make a project with parameters and documents, and with the model `base` as its base."""
    project = Project(root)
    write_changed_params(root / PARAMS_FILE, CHANGES)
    for split, texts in TEXTS.items():
        write_jsonl(project.out / "prepare" / f"{split}.jsonl", [{"text": text} for text in texts])
    shutil.copytree(base, project.out / "base")
    return project


def copy_project(project: Project, root: Path) -> Project:
    """Copy a project with its runs, which then name the files of the copy."""
    shutil.copytree(project.root, root, ignore=shutil.ignore_patterns(f"{STORE}*"))
    copy_store(project.root, root)
    return Project(root)


def copy_for_finetune(project: Project, root: Path, **changes: object) -> Path:
    """Copy what `finetune` reads, with these values of its parameters and an empty store."""
    for name in ("tokenize", "base"):
        shutil.copytree(project.out / name, root / "out" / name)
    write_changed_params(root / PARAMS_FILE, {"finetune": changes}, project.root / PARAMS_FILE)
    add_empty_store(root)
    return root


def stage_environment(root: Path, **more: str) -> dict[str, str]:
    """The environment of a stage in a process of its own: this code, the embedded store of `root`, and one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return kept | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(root), "OMP_NUM_THREADS": "1", **more}
