"""What DVC is asked to do, and how failures are reported, with a stand-in; `test_end_to_end.py` runs the real one."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.advice.experiments import check_place, reason, run_experiment
from pipeline.errors import UserError

STAND_IN = """#!/bin/sh
echo "$@" >> asked
case "$2" in
  list) cat names 2>/dev/null ;;
  run) cat run; exit $(cat code) ;;
esac
exit 0
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `dvc` that records its arguments, lists `names`, and exits from `run` with `code`."""
    (tmp_path / "bin").mkdir()
    dvc = tmp_path / "bin" / "dvc"
    dvc.write_text(STAND_IN)
    dvc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{dvc.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "run").write_text("Running stage\n")
    (tmp_path / "code").write_text("0")
    return tmp_path


def asked(project: Path) -> list[str]:
    return (project / "asked").read_text().splitlines()


def test_an_experiment_runs_beside_the_workspace(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_place()
    run_experiment("advise-0.5", "finetune", {"finetune.train_share": 0.5})
    assert asked(project) == [
        "exp list --name-only",
        "exp run --temp --name advise-0.5 --set-param finetune.train_share=0.5 finetune",
    ]
    assert capsys.readouterr().err == "Running stage\n"


def test_an_experiment_of_that_name_gives_way(project: Path) -> None:
    (project / "names").write_text("advise-0.25\nadvise-0.5\n")
    run_experiment("advise-0.5", "finetune", {})
    assert asked(project)[1:] == ["exp remove advise-0.5", "exp run --temp --name advise-0.5 finetune"]


def test_a_failure_names_the_experiment_and_shows_the_line_of_its_stage(project: Path) -> None:
    (project / "run").write_text("error: finetune.evaluations: too many\nERROR: failed to reproduce 'finetune'\n\n")
    (project / "code").write_text("255")
    with pytest.raises(UserError) as caught:
        run_experiment("advise-0.01", "finetune", {})
    assert str(caught.value) == (
        "`dvc exp run --temp --name advise-0.01 finetune` failed: finetune.evaluations: too many"
    )


def test_the_reason_of_a_failure() -> None:
    assert (
        reason(["step 1\n", "ERROR: first\n", "ERROR: Unable to acquire lock. \n", "\n"]) == "Unable to acquire lock."
    )
    assert reason(["Traceback\n", "ValueError: no\n"]) == "ValueError: no"
    assert reason([]) == "it does not say why"


def test_without_dvc_it_says_what_to_do(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"^dvc is not on the PATH; activate the environment first: "):
        check_place()


def test_outside_of_a_project_it_says_where_to_go(project: Path) -> None:
    (project / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"^dvc\.yaml: is not in this folder; go to the folder of the project$"):
        check_place()
