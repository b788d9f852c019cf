"""What a stage resumes from: named by all that its result depends on, and by nothing else."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from isolated_store import isolated_store

from pipeline import resume
from pipeline.tracking import runs, store

MODULE = '''"""The module."""

# A comment.
LIMIT = 3
"""A limit."""


def double(x: int) -> int:
    """Return twice x."""
    return 2 * x  # twice


class Pair:
    """Two numbers."""

    first: int
    """The first."""
'''


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> Iterator[Path]:
    with isolated_store(tmp_path):
        yield tmp_path


def digest(folder: Path, text: str, name: str = "module.py") -> str:
    (folder / name).write_text(text)
    return resume.code_digest(folder / name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""The module."""', '"""Another text."""'),
        ('"""The module."""\n', ""),
        ("# A comment.", "# Other words."),
        ('"""A limit."""\n', ""),
        ('"""Return twice x."""', '"""Give 2 x."""'),
        ("  # twice", ""),
        ('    """Two numbers."""\n', ""),
        ('"""The first."""', '"""The one before the second."""'),
        ("\n\n\n", "\n\n"),
    ],
)
def test_comments_and_docstrings_do_not_count(project: Path, old: str, new: str) -> None:
    assert old in MODULE
    assert digest(project, MODULE.replace(old, new)) == digest(project, MODULE)


@pytest.mark.parametrize(
    ("old", "new"), [("LIMIT = 3", "LIMIT = 4"), ("2 * x", "x * 2"), ("first: int", "first: float")]
)
def test_code_counts(project: Path, old: str, new: str) -> None:
    assert old in MODULE
    assert digest(project, MODULE.replace(old, new)) != digest(project, MODULE)


def test_every_byte_of_other_files_counts(project: Path) -> None:
    assert digest(project, "// a", "draw.cu") != digest(project, "// b", "draw.cu")


def test_a_fingerprint_depends_on_what_is_read_and_on_facts(project: Path) -> None:
    (project / "tokens").mkdir()
    (project / "tokens" / "train").write_text("1 2 3")
    name = resume.fingerprint("prepare", [project / "tokens"], "adamw")
    assert len(name) == 16
    assert resume.fingerprint("prepare", [project / "tokens"], "adamw") == name
    assert resume.fingerprint("prepare", [project / "tokens"], "muon") != name
    assert resume.fingerprint("tokenize", [project / "tokens"], "adamw") != name
    (project / "tokens" / "train").write_text("1 2 4")
    assert resume.fingerprint("prepare", [project / "tokens"], "adamw") != name


def test_work_of_another_fingerprint_is_removed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = resume.open_folder("tune", "a")
    (first / "study.db").touch()
    assert resume.open_folder("tune", "a") == first
    assert capsys.readouterr().err == ""
    second = resume.open_folder("tune", "b")
    assert "tune: data, models, parameters or code have changed since it was interrupted: it starts again" in (
        capsys.readouterr().err
    )
    assert list(second.parent.iterdir()) == [second]


def test_an_interrupted_run_is_resumed_while_the_store_holds_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = resume.open_folder("tune", "a")
    assert resume.interrupted_run("tune", folder) is None
    with runs.start_run("tune", {}) as run:
        resume.note_run(folder, run.run_id)
    assert resume.interrupted_run("tune", folder) == run.run_id
    assert capsys.readouterr().err == ""
    (folder / "study.db").touch()
    run.client.delete_run(run.run_id)
    assert resume.interrupted_run("tune", folder) is None
    assert "/mlflow.db does not hold the interrupted run: the work continues in a new run; " in capsys.readouterr().err
    assert (folder / "study.db").exists()


def test_a_killed_run_does_not_stay_running_once_its_work_is_removed(project: Path) -> None:
    client = store.connect()
    run_id = client.create_run(store.experiment_id(client)).info.run_id
    resume.note_run(resume.open_folder("tune", "a"), run_id)
    resume.open_folder("tune", "a")
    assert client.get_run(run_id).info.status == "RUNNING"
    resume.open_folder("tune", "b")
    assert client.get_run(run_id).info.status == "KILLED"


@pytest.mark.parametrize("status", ["FAILED", "FINISHED"])
def test_a_run_that_has_ended_is_left_as_it_is(status: str, project: Path) -> None:
    client = store.connect()
    run_id = client.create_run(store.experiment_id(client)).info.run_id
    client.set_terminated(run_id, status)
    for known in (run_id, "0" * 32):
        resume.note_run(resume.open_folder("tune", "a"), known)
        resume.open_folder("tune", "b")
    assert client.get_run(run_id).info.status == status


def test_outputs_of_the_same_fingerprint_are_kept(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = project / "out" / "tune"
    assert not resume.holds_outputs("tune", "f1", out)
    out.mkdir(parents=True)
    (out / "found.json").write_text("{}")
    assert not resume.holds_outputs("tune", "f1", out)
    with runs.start_run("tune", {}, fingerprint="f1") as run:
        run.tag_outputs(out)
    assert resume.holds_outputs("tune", "f1", out)
    assert f"nothing but comments and docstrings has changed since run {run.run_id} wrote {out}" in (
        capsys.readouterr().err
    )
    assert not resume.holds_outputs("tune", "f2", out)
    assert not resume.holds_outputs("finetune", "f1", out)
    (out / "found.json").write_text("{ }")
    assert not resume.holds_outputs("tune", "f1", out)
    shutil.rmtree(out)
    assert not resume.holds_outputs("tune", "f1", out)
