"""Recording stages from their files: as they end, and again in a store that lacks them."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from isolated_store import isolated_store
from mlflow import MlflowClient
from unused_model import log_unused_model

from pipeline.curves import write_curve
from pipeline.errors import UserError
from pipeline.files import write_json, write_jsonl
from pipeline.tracking import records, registry, runs, store
from pipeline.tracking.restore import holds_version, restore
from pipeline.tracking.tags import SAMPLES

PARAMETERS = {"finetune": {"seed": 1}, "register": {"name": "harbour-tales"}}
NAME = "harbour-tales"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path) -> Iterator[None]:
    with isolated_store(tmp_path):
        yield


@pytest.fixture
def client() -> MlflowClient:
    return store.connect()


def trial(number: int, state: str = "complete") -> dict[str, Any]:
    return {
        "number": number,
        "state": state,
        "prompts": 8,
        "values": {"temperature": 0.5 * number, "top_k": 0},
        "excess": 0.0,
        "distance": 5.0 + number,
        "too_tame": 2.0,
        "too_wild": 3.0 + number,
        "scores": {"rep_4": 0.01},
        "on_front": number == 0,
        "final": None,
        "edges": [],
        "preset": None,
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The outputs of a pipeline, of which no store knows."""
    out = tmp_path / "out"
    write_json(out / "finetune" / "metrics.json", {"validation_loss": 2.5})
    write_json(out / "finetune" / "details.json", {"validation_loss": 2.5, "best_step": 8, "steps": 8})
    write_curve(out / "finetune" / "loss_train.csv", [(1, 3.5), (8, 2.25)])
    write_curve(out / "finetune" / "loss_validation.csv", [(0, 4.0), (8, 2.5)])
    write_json(out / "export" / "parity.json", {"float32": {"kl_divergence": 1e-9}})
    write_json(out / "tune" / "trials.json", [trial(0), trial(1), trial(2, "pruned")])
    write_json(out / "tune" / "metrics.json", {"validation_distance": 5.5})
    write_json(out / "tune" / "found.json", {"balanced": {"temperature": 0.5, "top_k": 0}})
    details = {
        "protocol": {"provider": "cpu", "precision": "float32", "samples": 2, "documents": 1},
        "documents": {"base": {"bits_per_byte": 1.6}, "finetuned": {"bits_per_byte": 1.2}},
        "systems": {"human": {"rep_4": 0.01}, "hand_set": {"rep_4": 0.02, "distance": 7.0}},
        "scales": {"rep_4": 0.1},
        "choice": {"kept": "hand_set", "difference": 0.5},
    }
    write_json(out / "evaluate" / "details.json", details)
    write_json(out / "evaluate" / "metrics.json", {"test_bits_per_byte": 1.2})
    write_json(out / "evaluate" / "decoding.json", {"temperature": 0.8})
    figures = {"rep_4": 0.5, "longest_copy_tokens": 3, "invented_words": 1, "in_form": True}
    rows = [{"system": system, "prompt": "Once", "text": " more.", **figures} for system in ("human", "hand_set")]
    write_jsonl(out / "evaluate" / "samples.jsonl", rows)
    write_jsonl(out / "prepare" / "test.jsonl", [{"text": "Once more."}])
    return out


def record_evaluation(run: runs.RunLog, out: Path) -> None:
    test = out / "prepare" / "test.jsonl"
    records.record_evaluation(run, out / "evaluate", out / "export" / "parity.json", test, PARAMETERS)


@pytest.fixture
def recorded(out: Path, client: MlflowClient, tmp_path: Path) -> Path:
    """The outputs of a pipeline whose records the store has: runs of four stages, and version 1."""
    parent = records.parent_run(client, out / "finetune", PARAMETERS)
    with runs.start_run("tune", PARAMETERS, parent_run_id=parent) as run:
        records.record_search(run, out / "tune")
    with runs.start_run("evaluate", PARAMETERS, parent_run_id=parent) as run:
        record_evaluation(run, out)
    with runs.start_run("register", PARAMETERS, parent_run_id=parent) as run:
        uri = log_unused_model(run.run_id, tmp_path, {})
    mlflow.register_model(uri, NAME, tags={registry.FINGERPRINT_TAG: "f1"})
    write_json(out / "register" / "version.json", {"name": NAME, "fingerprint": "f1"})
    return out


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with each command that a stand-in for dvc got; the stand-in fails if a file `fail` is in that folder."""
    program = tmp_path / "bin" / "dvc"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\ntest ! -e {tmp_path}/fail\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    return tmp_path / "commands"


def runs_of(client: MlflowClient, stage: str) -> list[str]:
    found = client.search_runs([store.experiment_id(client)], filter_string=f"tags.`{runs.STAGE_TAG}` = '{stage}'")
    return [str(run.info.run_id) for run in found]


def curve(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_a_run_that_another_store_holds_is_recorded_again_once(
    client: MlflowClient, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = records.parent_run(client, out / "finetune", PARAMETERS)
    assert capsys.readouterr().err == (
        f"the tracking store does not hold the run that wrote {out / 'finetune'}; recording it again\n"
    )
    assert records.parent_run(client, out / "finetune", PARAMETERS) == recorded
    assert capsys.readouterr().err == ""
    run = client.get_run(recorded)
    assert run.info.status == "FINISHED"
    assert run.data.tags[runs.STAGE_TAG] == "finetune"
    assert run.data.params == {"finetune.seed": "1"}
    assert run.data.metrics["final/validation_loss"] == 2.5
    assert run.data.metrics["final/steps"] == 8
    assert curve(client, recorded, "train_loss") == [(1, 3.5), (8, 2.25)]
    assert curve(client, recorded, "validation_loss") == [(0, 4.0), (8, 2.5)]


def test_a_search_is_recorded_with_its_trials(client: MlflowClient, recorded: Path) -> None:
    (run_id,) = runs_of(client, "tune")
    metrics = client.get_run(run_id).data.metrics
    assert {name: metrics[f"tune/{name}"] for name in ("validation_distance", "trials", "pruned")} == {
        "validation_distance": 5.5,
        "trials": 3,
        "pruned": 1,
    }
    assert curve(client, run_id, "trial_distance") == [(0, 5.0), (1, 6.0)]
    trials = [client.get_run(child) for child in runs_of(client, runs.TRIAL)]
    assert {run.info.run_name for run in trials} == {"trial 0", "trial 1", "trial 2"}
    (last,) = [run for run in trials if run.info.run_name == "trial 2"]
    assert last.data.params == {"temperature": "1.0", "top_k": "0"}
    assert last.data.metrics == {
        "rep_4": 0.01,
        "excess": 0.0,
        "distance": 7.0,
        "too_tame": 2.0,
        "too_wild": 5.0,
    }
    assert last.data.tags["tune.state"] == "pruned"


def test_trials_that_the_run_has_already_are_not_recorded_twice(client: MlflowClient, out: Path) -> None:
    parent = records.parent_run(client, out / "finetune", PARAMETERS)
    with runs.start_run("tune", PARAMETERS, parent_run_id=parent) as run:
        records.record_trial(run, trial(0), start_s=1.0)
        records.record_search(run, out / "tune")
    assert len(runs_of(client, runs.TRIAL)) == 3
    assert curve(client, run.run_id, "trial_distance") == [(0, 5.0), (1, 6.0)]


def test_the_fine_tuning_shows_what_became_of_it(client: MlflowClient, recorded: Path) -> None:
    (parent,) = runs_of(client, "finetune")
    run = client.get_run(parent)
    assert run.info.run_name == NAME
    metrics = run.data.metrics
    assert {name: metrics[name] for name in ("validation_distance", "test_bits_per_byte")} == {
        "validation_distance": 5.5,
        "test_bits_per_byte": 1.2,
    }
    note = run.data.tags["mlflow.note.content"]
    assert re.findall("^## (.+)$", note, re.MULTILINE) == ["Fine-tuning", "Decoding", "Evaluation"]
    (evaluation,) = runs_of(client, "evaluate")
    (samples,) = runs_of(client, SAMPLES)
    assert f"runs/{evaluation}/artifacts/report.html" in note
    assert f"runs/{samples}/traces" in note
    found = client.get_run(samples)
    assert found.info.run_name == NAME
    assert found.data.metrics["rep_4/mean"] == 0.5
    assert found.data.metrics["test_bits_per_byte"] == 1.2
    assert found.data.params == {"temperature": "0.8"}


def test_checkpoints_are_models_with_their_scores(client: MlflowClient, recorded: Path) -> None:
    (parent,) = runs_of(client, "finetune")
    found = client.search_logged_models([store.experiment_id(client)], f"source_run_id = '{parent}'")
    models = {model.name: model for model in found}
    scores = {name: [(own.key, own.value) for own in model.metrics] for name, model in models.items()}
    assert scores == {"checkpoint-0": [("validation_loss", 4.0)], "checkpoint-8": [("validation_loss", 2.5)]}
    assert models["checkpoint-8"].params == {"step": "8"}
    assert models["checkpoint-8"].tags[runs.BEST_TAG] == "true"
    assert runs.BEST_TAG not in models["checkpoint-0"].tags
    steps = {output.model_id: output.step for output in client.get_run(parent).outputs.model_outputs}
    assert steps == {models["checkpoint-0"].model_id: 0, models["checkpoint-8"].model_id: 8}


def test_nothing_is_recorded_if_all_is_there(client: MlflowClient, recorded: Path, commands: Path) -> None:
    before = {stage: runs_of(client, stage) for stage in ("finetune", "tune", "evaluate")}
    restore(recorded, PARAMETERS)
    assert {stage: runs_of(client, stage) for stage in before} == before
    assert not commands.exists()


def test_another_store_gets_every_run_and_the_version(recorded: Path, commands: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with isolated_store(tmp_path / "other"):
        restore(recorded, PARAMETERS)
        other = store.connect()
        assert [len(runs_of(other, stage)) for stage in ("finetune", "tune", "evaluate", runs.TRIAL)] == [1, 1, 1, 3]
        (parent,) = runs_of(other, "finetune")
        (evaluation,) = runs_of(other, "evaluate")
        assert other.get_run(evaluation).data.tags["mlflow.parentRunId"] == parent
    # Nothing that was computed is computed again.
    assert commands.read_text().splitlines() == ["repro --force --single-item register"]


@pytest.mark.parametrize("stage", ["finetune", "tune", "evaluate"])
def test_a_deleted_run_alone_is_recorded_again(
    client: MlflowClient, recorded: Path, commands: Path, stage: str
) -> None:
    (lost,) = runs_of(client, stage)
    client.delete_run(lost)
    restore(recorded, PARAMETERS)
    (again,) = runs_of(client, stage)
    assert again != lost
    assert not commands.exists()


def test_a_lost_version_is_registered_again(client: MlflowClient, recorded: Path, commands: Path) -> None:
    client.delete_model_version(NAME, "1")
    restore(recorded, PARAMETERS)
    assert commands.read_text().splitlines() == ["repro --force --single-item register"]
    client.delete_registered_model(NAME)
    assert not holds_version(client, recorded / "register" / "version.json")


def test_a_version_whose_files_are_gone_is_not_held(client: MlflowClient, recorded: Path) -> None:
    file = recorded / "register" / "version.json"
    assert holds_version(client, file)
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    shutil.rmtree(model.artifact_location.removeprefix("file://"))
    assert not holds_version(client, file)


def test_another_version_of_that_number_is_not_the_one(client: MlflowClient, recorded: Path) -> None:
    client.set_model_version_tag(NAME, "1", registry.FINGERPRINT_TAG, "f2")
    assert not holds_version(client, recorded / "register" / "version.json")


def test_a_registration_that_fails_ends_it(
    client: MlflowClient, recorded: Path, commands: Path, tmp_path: Path
) -> None:
    client.delete_model_version(NAME, "1")
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match=r"^register failed; see above"):
        restore(recorded, PARAMETERS)
