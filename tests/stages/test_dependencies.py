"""The stages that read a part of another's folder run on what dvc.yaml lists of it, and on no more."""

import importlib
import shutil
from pathlib import Path

import pytest
from dag import STAGES, arguments, outs
from toy_project import Project

from pipeline.params.section import PARAMS_FILE


@pytest.mark.parametrize("stage", ["evaluate", "register"])
def test_a_stage_runs_on_its_dependencies_alone(stage: str, project: Project, tmp_path: Path) -> None:
    # The store is empty: the run is recorded again, which reads more than a stage does otherwise.
    shutil.copy(project.root / PARAMS_FILE, tmp_path)
    for path in (path for path in STAGES[stage]["deps"] if path.startswith("out/")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (project.root / path).is_dir() else shutil.copy
        copy(project.root / path, tmp_path / path)
    Project(tmp_path).run(importlib.import_module(f"pipeline.stages.{stage}"), *arguments(stage))
    for path in outs(stage):
        assert (tmp_path / path).exists()
