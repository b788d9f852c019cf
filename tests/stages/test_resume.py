"""Fine-tuning that is killed goes on where it was, in the same run, and ends as if nothing had happened."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from isolated_store import VARIABLES, isolated_store
from mlflow import MlflowClient
from toy_project import Project

from pipeline import tracking
from pipeline.files import read_json, sha256_file
from pipeline.params import PARAMS_FILE
from pipeline.training import resume

ROOT = Path(__file__).parents[2]
OUTPUTS = ("checkpoint/model.safetensors", "loss_train.csv", "loss_validation.csv", "metrics.json")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")


def make_folder(project: Project, folder: Path) -> Path:
    """What `finetune` needs, with training long enough to be killed in the middle."""
    shutil.copytree(project.out / "tokenize", folder / "out" / "tokenize")
    shutil.copytree(project.out / "base", folder / "out" / "base")
    shutil.copy(project.root / PARAMS_FILE, folder)
    change(folder, "epochs", 6 * project.params.finetune.epochs)
    with isolated_store(folder):
        pass
    return folder


def change(folder: Path, parameter: str, value: float) -> None:
    text = (folder / PARAMS_FILE).read_text()
    changed, count = re.subn(rf"(?m)^  {parameter}: .*$", f"  {parameter}: {value}", text)
    assert count == 1
    (folder / PARAMS_FILE).write_text(changed)


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.stages.finetune", "out/tokenize", "out/base", "out/finetune"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(folder), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def finish(folder: Path) -> str:
    process = start(folder)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def kill_after(folder: Path, evaluations: int) -> None:
    """Kill it when so many evaluations after the first, of the base, are told: the last of them is being saved."""
    process = start(folder)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step ") and not line.startswith("step 0 "):
            evaluations -= 1
        if evaluations == 0:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "out" / "finetune").exists()


def test_a_killed_training_ends_as_if_it_had_not_been(project: Project, tmp_path: Path) -> None:
    whole, parts = (make_folder(project, tmp_path / name) for name in ("whole", "parts"))
    assert "going on" not in finish(whole)
    kill_after(parts, 2)
    state = parts / resume.FOLDER
    (folder,) = state.iterdir()
    run_id = read_json(folder / resume.RUN_FILE)["run_id"]
    # As a kill would leave it in the middle of the next.
    (folder / "checkpoint-1000000").mkdir()
    said = finish(parts)
    assert "checkpoint-1000000 was cut off while it was written, and is left out" in said
    assert "going on from step " in said
    for name in OUTPUTS:
        assert sha256_file(parts / "out" / "finetune" / name) == sha256_file(whole / "out" / "finetune" / name), name
    assert read_json(parts / "out" / "finetune" / "run.json")["run_id"] == run_id
    assert list(state.iterdir()) == []
    with isolated_store(parts):
        client = tracking.connect()
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert len(client.search_runs([run.info.experiment_id])) == 1
        compare_histories(client, run_id, whole)


def compare_histories(client: MlflowClient, run_id: str, whole: Path) -> None:
    """Every metric has each step once, with the values of a run that was not interrupted."""
    other_id = read_json(whole / "out" / "finetune" / "run.json")["run_id"]
    found = {name: client.get_metric_history(run_id, name) for name in client.get_run(run_id).data.metrics}
    rows = client.load_table(client.get_run(run_id).info.experiment_id, "samples.json", run_ids=[run_id])
    with isolated_store(whole):
        other = tracking.connect()
        assert set(found) == set(other.get_run(other_id).data.metrics)
        for name, points in found.items():
            expected = other.get_metric_history(other_id, name)
            assert [point.step for point in points] == [point.step for point in expected], name
            if name != "tokens_per_second":
                assert [point.value for point in points] == [point.value for point in expected], name
        experiment = other.get_run(other_id).info.experiment_id
        expected_rows = other.load_table(experiment, "samples.json", run_ids=[other_id])
    assert rows.to_dict("records") == expected_rows.to_dict("records")


def test_other_parameters_start_afresh(project: Project, tmp_path: Path) -> None:
    folder = make_folder(project, tmp_path / "project")
    kill_after(folder, 2)
    change(folder, "learning_rate", 0.0001)
    said = finish(folder)
    assert "have changed since the interrupted fine-tuning: it starts afresh" in said
    assert "going on" not in said


def test_a_run_that_is_gone_starts_afresh(project: Project, tmp_path: Path) -> None:
    folder = make_folder(project, tmp_path / "project")
    kill_after(folder, 2)
    (folder / "mlflow.db").unlink()
    with isolated_store(folder):
        pass
    assert "the tracking store no longer holds the interrupted run: it starts afresh" in finish(folder)


def test_killed_before_the_first_checkpoint_it_begins_anew(project: Project, tmp_path: Path) -> None:
    folder = make_folder(project, tmp_path / "project")
    with isolated_store(folder):
        with tracking.start_run("finetune", {}) as run:
            pass
        state = resume.open_state("a")
        state.begin(run.run_id)
        from pipeline.stages.finetune import run_to_go_on

        assert run_to_go_on(state) is None
        assert tracking.connect().get_run(run.run_id).info.status == "KILLED"
