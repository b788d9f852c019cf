import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from isolated_store import isolated_store
from mlflow import MlflowClient
from unused_model import log_unused_model

from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.tracking import registry, runs, store
from pipeline.tracking.restore import missing_stages, parent_run, restore

PARAMETERS = {"finetune": {"seed": 1}}
NAME = "harbour-tales"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path) -> Iterator[None]:
    with isolated_store(tmp_path):
        yield


@pytest.fixture
def client() -> MlflowClient:
    return store.connect()


def new_run(stage: str, parent_run_id: str | None = None) -> str:
    with runs.start_run(stage, PARAMETERS, parent_run_id=parent_run_id) as run:
        return run.run_id


def write_finetune(folder: Path, run_id: str) -> Path:
    """The outputs of finetune that a run can be made from anew."""
    write_json(folder / "run.json", {"run_id": run_id})
    write_json(folder / "metrics.json", {"validation_loss": 2.5, "steps": 8})
    (folder / "loss_train.csv").write_text("step,loss\n1,3.5\n8,2.25\n")
    (folder / "loss_validation.csv").write_text("step,loss\n0,4.0\n8,2.5\n")
    return folder


@pytest.fixture
def out(client: MlflowClient, tmp_path: Path) -> Path:
    """The outputs of a pipeline whose records are all there: runs of four stages, and version 1."""
    finetune, out = new_run("finetune"), tmp_path / "out"
    new_run("tune", finetune)
    new_run("evaluate", finetune)
    with runs.start_run("register", PARAMETERS, parent_run_id=finetune) as run:
        uri = log_unused_model(run.run_id, tmp_path, {})
    version = mlflow.register_model(uri, NAME, tags={registry.FINGERPRINT_TAG: "f1"})
    write_finetune(out / "finetune", finetune)
    write_json(out / "register" / "version.json", {"name": NAME, "version": int(version.version), "fingerprint": "f1"})
    return out


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to which each command of a stand-in for dvc goes; it fails when `fail` stands beside it."""
    program = tmp_path / "bin" / "dvc"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\ntest ! -e {tmp_path}/fail\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    return tmp_path / "commands"


def run_of(client: MlflowClient, stage: str) -> str:
    """The only run of a stage."""
    (run,) = client.search_runs([store.experiment_id(client)], filter_string=f"tags.`{runs.STAGE_TAG}` = '{stage}'")
    return str(run.info.run_id)


def curve(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_a_run_that_the_store_holds_is_the_parent(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = new_run("finetune")
    assert parent_run(client, write_finetune(tmp_path / "finetune", run_id), PARAMETERS) == run_id
    assert capsys.readouterr().err == ""


def test_a_run_that_another_store_holds_is_made_anew_once(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = new_run("finetune")
    finetune = write_finetune(tmp_path / "finetune", lost)
    (tmp_path / "other").mkdir()
    with isolated_store(tmp_path / "other"):
        other = store.connect()
        restored = parent_run(other, finetune, PARAMETERS)
        assert restored != lost
        assert capsys.readouterr().err.startswith(f"the tracking store does not hold run {lost}; making it anew from ")
        assert parent_run(other, finetune, PARAMETERS) == restored
        assert capsys.readouterr().err == ""
        run = other.get_run(restored)
    assert run.info.status == "FINISHED"
    assert run.data.tags[runs.STAGE_TAG] == "finetune"
    assert run.data.tags[runs.RESTORES_TAG] == lost
    assert run.data.params == {"finetune.seed": "1"}
    assert run.data.metrics["final/validation_loss"] == 2.5
    assert run.data.metrics["final/steps"] == 8


def test_a_deleted_run_gets_its_curves_back(client: MlflowClient, tmp_path: Path) -> None:
    lost = new_run("finetune")
    client.delete_run(lost)
    restored = parent_run(client, write_finetune(tmp_path / "finetune", lost), PARAMETERS)
    assert curve(client, restored, "train_loss") == [(1, 3.5), (8, 2.25)]
    assert curve(client, restored, "validation_loss") == [(0, 4.0), (8, 2.5)]


def test_nothing_is_missing_where_all_is_there(client: MlflowClient, out: Path) -> None:
    assert missing_stages(client, out) == []


def test_a_lost_run_takes_its_children_with_it(client: MlflowClient, out: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with isolated_store(tmp_path / "other"):
        assert missing_stages(store.connect(), out) == ["tune", "evaluate", "register"]


def test_lost_scores_are_missing(client: MlflowClient, out: Path) -> None:
    client.delete_run(run_of(client, "evaluate"))
    assert missing_stages(client, out) == ["evaluate", "register"]


def test_a_lost_search_is_missing_and_nothing_else(client: MlflowClient, out: Path) -> None:
    client.delete_run(run_of(client, "tune"))
    assert missing_stages(client, out) == ["tune"]


def test_a_lost_version_alone_is_registered_again(client: MlflowClient, out: Path) -> None:
    client.delete_model_version(NAME, "1")
    assert missing_stages(client, out) == ["register"]
    client.delete_registered_model(NAME)
    assert missing_stages(client, out) == ["register"]


def test_a_version_whose_files_are_gone_is_registered_again(client: MlflowClient, out: Path, tmp_path: Path) -> None:
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    shutil.rmtree(model.artifact_location.removeprefix("file://"))
    assert missing_stages(client, out) == ["register"]


def test_another_version_of_that_number_is_not_the_one(client: MlflowClient, out: Path) -> None:
    client.set_model_version_tag(NAME, "1", registry.FINGERPRINT_TAG, "f2")
    assert missing_stages(client, out) == ["register"]


def test_scores_under_a_restored_run_count(client: MlflowClient, out: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with isolated_store(tmp_path / "other"):
        other = store.connect()
        restored = parent_run(other, out / "finetune", PARAMETERS)
        new_run("tune", restored)
        new_run("evaluate", restored)
        assert missing_stages(other, out) == ["register"]


def test_nothing_runs_where_all_is_there(out: Path, commands: Path) -> None:
    restore(out)
    assert not commands.exists()


def test_each_missing_stage_runs_again_alone(out: Path, commands: Path, client: MlflowClient) -> None:
    client.delete_run(run_of(client, "finetune"))
    restore(out)
    assert commands.read_text().splitlines() == [
        "repro --force --single-item tune",
        "repro --force --single-item evaluate",
        "repro --force --single-item register",
    ]


def test_a_stage_that_fails_ends_it(out: Path, commands: Path, client: MlflowClient, tmp_path: Path) -> None:
    client.delete_run(run_of(client, "finetune"))
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match=r"^tune failed; see above"):
        restore(out)
    assert commands.read_text().splitlines() == ["repro --force --single-item tune"]
