"""A toy project, and the way to take it through the stages."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from isolated_store import isolated_store
from ruamel.yaml import YAML

import pipeline
from pipeline.files import write_jsonl
from pipeline.params.file import PARAMS_FILE, read_yaml
from pipeline.params.whole import Params, load_params

ROOT = Path(pipeline.__file__).parents[1]
TEXTS = {
    "train": [f"The lamp on rock {number} went out before the tide." for number in range(60)],
    "validation": [f"The baker lit oven {number} before the morning." for number in range(8)],
    "test": [
        "The lamp went out — nobody said so.",
        "They say the tide brings back what the morning took.",
        "Nobody on the rock had seen the lamp go out. " * 8,
    ],
}
"""The last test document is longer than the tiny model's context of 64 tokens."""
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
        """Be in the folder, as every stage is."""
        with isolated_store(self.root):
            yield

    def run(self, stage: ModuleType, *paths: str) -> None:
        """Run a stage as its command does."""
        with self.entered(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["stage", *paths])
            stage.main()


def make_project(root: Path, base: Path) -> Project:
    """A project with parameters and documents, and with the model `base` as its base."""
    project = Project(root)
    write_params(root / PARAMS_FILE)
    for split, texts in TEXTS.items():
        write_jsonl(project.out / "prepare" / f"{split}.jsonl", [{"text": text} for text in texts])
    shutil.copytree(base, project.out / "base")
    return project


def merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put the changes in their places among nested values."""
    for key, change in changes.items():
        if isinstance(change, dict):
            merge(values[key], change)
        else:
            values[key] = change


def write_params(path: Path) -> None:
    """The committed parameters, made fit for the toy project."""
    values = read_yaml(ROOT / PARAMS_FILE)
    merge(values, CHANGES)
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(values, file)
