"""The contents of dvc.yaml, for tests of it."""

import shlex
from pathlib import Path
from typing import Any

import pipeline
from pipeline.params.section import read_yaml

ROOT = Path(pipeline.__file__).parents[1]
DAG = read_yaml(ROOT / "dvc.yaml")
STAGES: dict[str, dict[str, Any]] = DAG["stages"]


def outs(stage: str) -> list[str]:
    """Return what a stage writes; an output with options is a mapping of one key."""
    return [path if isinstance(path, str) else next(iter(path)) for path in STAGES[stage]["outs"]]


def arguments(stage: str) -> list[str]:
    """Return the arguments after the module in a stage's command."""
    return shlex.split(STAGES[stage]["cmd"])[3:]
