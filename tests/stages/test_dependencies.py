"""The stages that read a part of another's folder run on what dvc.yaml lists of it, and on no more."""

import importlib
import shlex
import shutil
from pathlib import Path

import pytest
from toy_project import ROOT, Project

from pipeline.params import PARAMS_FILE, read_yaml

STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]


@pytest.mark.parametrize("stage", ["evaluate", "register"])
def test_a_stage_runs_on_its_dependencies_alone(stage: str, project: Project, tmp_path: Path) -> None:
    # The store is empty: the run is made anew, which reads more than a stage does otherwise.
    shutil.copy(project.root / PARAMS_FILE, tmp_path)
    for path in (path for path in STAGES[stage]["deps"] if path.startswith("out/")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (project.root / path).is_dir() else shutil.copy
        copy(project.root / path, tmp_path / path)
    arguments = shlex.split(STAGES[stage]["cmd"])[3:]
    Project(tmp_path).run(importlib.import_module(f"pipeline.stages.{stage}"), *arguments)
    for path in [*STAGES[stage]["outs"], *STAGES[stage].get("metrics", [])]:
        assert (tmp_path / path).is_file()
