"""A killed fine-tuning resumes where it was, in the same run, and ends as if nothing had happened."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from changed_params import write_changed_params
from isolated_store import STORE, isolated_store
from mlflow import MlflowClient
from toy_project import Project, copy_for_finetune, stage_environment

from pipeline import resume
from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file
from pipeline.params.section import PARAMS_FILE
from pipeline.stages import finetune as stage
from pipeline.tracking import store
from pipeline.tracking.runs import find_run
from pipeline.training.state import WHOLE_FILE, TrainingState, open_state

OUTPUTS = ("checkpoint/model.safetensors", "loss_train.csv", "loss_validation.csv", "metrics.json")

MEASURED = {"tokens_per_second", "peak_memory_mib"}
"""Metrics of the process, which differ from one process to the next."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")


def long_training(project: Project, folder: Path) -> Path:
    """What `finetune` needs, with training long enough to be killed in the middle."""
    return copy_for_finetune(project, folder, epochs=6 * project.params.finetune.epochs)


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.stages.finetune", "out/tokenize", "out/base", "out/finetune"],
        cwd=folder,
        env=stage_environment(folder, **environment),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def finish(folder: Path) -> str:
    process = start(folder)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def wait_for_evaluations(process: subprocess.Popen[str], evaluations: int) -> None:
    """Wait for as many evaluations after the first, which is of the base. The last one is then being saved."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step ") and not line.startswith("step 0 "):
            evaluations -= 1
        if evaluations == 0:
            return


def kill_after(folder: Path, evaluations: int) -> None:
    process = start(folder)
    wait_for_evaluations(process, evaluations)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "out" / "finetune").exists()


def check_outputs(parts: Path, whole: Path) -> None:
    for name in OUTPUTS:
        assert sha256_file(parts / "out" / "finetune" / name) == sha256_file(whole / "out" / "finetune" / name), name


@pytest.fixture(scope="module")
def whole(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted."""
    folder = long_training(project, tmp_path_factory.mktemp("whole") / "project")
    assert "resuming" not in finish(folder)
    return folder


def test_a_killed_training_ends_as_if_it_had_not_been(project: Project, whole: Path, tmp_path: Path) -> None:
    parts = long_training(project, tmp_path / "parts")
    kill_after(parts, 2)
    state = parts / resume.RESUME_FOLDER / "finetune"
    (folder,) = state.iterdir()
    run_id = read_json(folder / resume.RUN_FILE)["run_id"]
    # As a kill would leave it in the middle of the next.
    (folder / "checkpoint-1000000").mkdir()
    said = finish(parts)
    assert "checkpoint-1000000 is not whole, and is removed" in said
    assert "resuming from step " in said
    check_outputs(parts, whole)
    assert list(state.iterdir()) == []
    with isolated_store(parts):
        client = store.connect()
        assert find_run(client, "finetune", parts / "out" / "finetune") == run_id
        run = client.get_run(run_id)
        assert len(client.search_runs([run.info.experiment_id])) == 1
        compare_histories(client, run_id, whole)


def names_of(client: MlflowClient, run_id: str) -> set[str]:
    return {name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")}


def compare_histories(client: MlflowClient, run_id: str, whole: Path) -> None:
    """Every metric has each step once, with the values of a run that was not interrupted; the machine's are others."""
    found = {name: client.get_metric_history(run_id, name) for name in names_of(client, run_id)}
    rows = client.load_table(client.get_run(run_id).info.experiment_id, "samples.json", run_ids=[run_id])
    with isolated_store(whole):
        other = store.connect()
        other_id = find_run(other, "finetune", whole / "out" / "finetune")
        assert other_id is not None
        assert set(found) == names_of(other, other_id)
        for name, points in found.items():
            expected = other.get_metric_history(other_id, name)
            assert [point.step for point in points] == [point.step for point in expected], name
            if name not in MEASURED:
                assert [point.value for point in points] == [point.value for point in expected], name
        experiment = other.get_run(other_id).info.experiment_id
        expected_rows = other.load_table(experiment, "samples.json", run_ids=[other_id])
    assert rows.to_dict("records") == expected_rows.to_dict("records")


def stop_after_an_evaluation(process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Return the step that the training stopped after."""
    wait_for_evaluations(process, 1)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    return int(said.split("stopped after step ")[1].split(";")[0])


def test_one_that_sigterm_stops_saves_first_and_resumes_whatever_else_has_changed(
    project: Project, whole: Path, tmp_path: Path
) -> None:
    parts = long_training(project, tmp_path / "parts")
    step = stop_after_an_evaluation(start(parts), signal.SIGTERM)
    others = {"tune": {"trials": 3}, "evaluate": {"samples": 7}, "register": {"name": "other"}}
    write_changed_params(parts / PARAMS_FILE, others, parts / PARAMS_FILE)
    assert f"resuming from step {step} of the interrupted fine-tuning" in finish(parts)
    check_outputs(parts, whole)
    with isolated_store(parts):
        client = store.connect()
        run_id = find_run(client, "finetune", parts / "out" / "finetune")
        assert run_id is not None
        compare_histories(client, run_id, whole)


@pytest.mark.slow
def test_one_that_ctrl_c_stops_saves_first_and_resumes_where_the_store_is_another(
    project: Project, whole: Path, tmp_path: Path
) -> None:
    parts = long_training(project, tmp_path / "parts")
    other = parts / "other.db"
    shutil.copy(parts / STORE, other)
    step = stop_after_an_evaluation(start(parts, MLFLOW_TRACKING_URI=f"sqlite:///{other}"), signal.SIGINT)
    said = finish(parts)
    assert "/mlflow.db does not hold the interrupted run: the work continues in a new run; " in said
    assert f"resuming from step {step} of the interrupted fine-tuning" in said
    check_outputs(parts, whole)
    for name in ("train_loss", "gradient_norm", "validation_loss"):
        assert history(parts, name) == history(whole, name)


def history(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return the points of a metric of the run that wrote the folder's outputs."""
    with isolated_store(folder):
        client = store.connect()
        run_id = find_run(client, "finetune", folder / "out" / "finetune")
        assert run_id is not None
        return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_a_second_one_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "LOCK_WAIT_S", 0.1)
    monkeypatch.chdir(tmp_path)
    with (
        resume.only_resumer("finetune"),
        pytest.raises(UserError, match=r"^\.resume/finetune\.lock: another process writes to \.resume/finetune; wait"),
        resume.only_resumer("finetune"),
    ):
        pass


def test_training_resumes_from_the_newest_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / WHOLE_FILE).touch()
    (tmp_path / "checkpoint-1000").mkdir()
    state = open_state(tmp_path)
    assert state.checkpoint == tmp_path / "checkpoint-100"
    assert not (tmp_path / "checkpoint-1000").exists()
    said = capsys.readouterr().err
    assert "checkpoint-1000 is not whole, and is removed" in said
    assert "finetune: resuming from step 100 of the interrupted fine-tuning" in said


@pytest.mark.parametrize(("best", "kept"), [(None, 100), (10, 10), (100, 100)])
def test_the_best_checkpoint_or_else_the_newest_is_kept_while_another_is_written(
    best: int | None, kept: int, tmp_path: Path
) -> None:
    for step in (9, 10, 100, 101):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / WHOLE_FILE).touch()
    # Another process has begun to write it.
    (tmp_path / "checkpoint-101" / WHOLE_FILE).unlink()
    TrainingState(tmp_path).make_room(None if best is None else f"elsewhere/checkpoint-{best}")
    assert {folder.name for folder in tmp_path.iterdir()} == {f"checkpoint-{kept}", "checkpoint-101"}


def test_the_fingerprint_is_of_data_base_and_parameters(project: Project, tmp_path: Path) -> None:
    tokens, base = (shutil.copytree(project.out / name, tmp_path / name) for name in ("tokenize", "base"))
    params = project.params.finetune
    first = stage.fingerprint(tokens, base, params)
    assert first == stage.fingerprint(project.out / "tokenize", project.out / "base", params)
    others = [stage.fingerprint(tokens, base, params.model_copy(update={"learning_rate": 0.5}))]
    for folder in (tokens, base):
        (folder / "more").write_text("")
        others.append(stage.fingerprint(tokens, base, params))
    assert len({first, *others}) == 4


def test_a_training_killed_before_its_first_checkpoint_starts_again_in_the_same_run(
    project: Project, whole: Path, tmp_path: Path
) -> None:
    parts = long_training(project, tmp_path / "parts")
    kill_after(parts, 1)
    (folder,) = (parts / resume.RESUME_FOLDER / "finetune").iterdir()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run_id = read_json(folder / resume.RUN_FILE)["run_id"]
    assert "resuming" not in finish(parts)
    with isolated_store(parts):
        client = store.connect()
        assert find_run(client, "finetune", parts / "out" / "finetune") == run_id
        compare_histories(client, run_id, whole)


def test_a_training_of_which_only_comments_changed_is_kept(whole: Path) -> None:
    weights = whole / "out" / "finetune" / "checkpoint" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert "finetune: nothing but comments and docstrings has changed since run " in finish(whole)
    assert weights.stat().st_mtime_ns == written
