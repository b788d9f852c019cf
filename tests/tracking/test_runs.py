"""What a run records in the MLflow store, where the store is, and what happens if it does not answer."""

import base64
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from changed_params import ROOT
from isolated_store import isolated_store
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.tracking import lineage, runs, store

CLOSED_PORT = 9
"""Discard, which nothing serves nowadays: a connection is refused at once."""

CONNECT = "from pipeline.tracking.store import connect, experiment_id; print(experiment_id(connect()))"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path) -> Iterator[None]:
    with isolated_store(tmp_path):
        yield


def logged_run(stage: str = "finetune", **arguments: object) -> tuple[MlflowClient, Run]:
    """A finished run without parameters."""
    with runs.start_run(stage, {}, **arguments) as run:  # type: ignore[arg-type]
        pass
    return run.client, run.client.get_run(run.run_id)


class Echo(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    def predict(self, context: object, model_input: list[str]) -> list[str]:
        return model_input


def registered_model() -> int:
    """Register a model in the project's store and return its version."""
    with runs.start_run("register", {}) as run, mlflow.start_run(run_id=run.run_id):
        logged = mlflow.pyfunc.log_model(
            name="echo", python_model=Echo(), pip_requirements=[], registered_model_name="echo"
        )
    return int(logged.registered_model_version)


def test_runs_are_stored_beside_the_project_and_files_at_an_absolute_place(tmp_path: Path) -> None:
    client = store.connect()
    experiment = client.get_experiment(store.experiment_id(client))
    assert client.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert experiment.name == store.EXPERIMENT
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()


def test_files_are_found_after_the_project_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Characters that mean something to SQL and to URIs, and a name that begins like another project's.
    old, new, neighbour = tmp_path / "my_50% off", tmp_path / "what? 100% #place", tmp_path / "my_50% off 2"
    for folder in (old, neighbour):
        folder.mkdir()
        shutil.copy(tmp_path / "mlflow.db", folder)
    monkeypatch.setenv("DVC_ROOT", str(old))
    client, run = logged_run()
    (tmp_path / "note.txt").write_text("kept")
    client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
    elsewhere = client.create_experiment("elsewhere", artifact_location=(neighbour / "mlartifacts2").as_uri())
    version = registered_model()
    mlflow.set_tracking_uri(None)
    old.rename(new)
    monkeypatch.setenv("DVC_ROOT", str(new))
    client = store.connect()
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["note.txt"]
    assert client.get_experiment(elsewhere).artifact_location == (neighbour / "mlartifacts2").as_uri()
    mlflow.pyfunc.load_model(f"models:/echo/{version}")
    _, later = logged_run()
    client.log_artifact(later.info.run_id, str(tmp_path / "note.txt"))
    assert (new / "mlartifacts" / later.info.run_id / "artifacts" / "note.txt").is_file()
    # And no folder was made whose name is that of the project in a URI.
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {new.name, neighbour.name}


def test_a_folder_that_mlflow_would_not_find_again_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "a%20b"))
    with pytest.raises(UserError, match=r"a%20b: MLflow takes a % .* rename the folder"):
        store.connect()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    store.connect()


def test_dvc_root_is_where_the_store_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # DVC runs a queued experiment in a temporary copy of the project.
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    logged_run()
    assert list((tmp_path / "copy").iterdir()) == []


def test_without_dvc_the_current_folder_holds_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT")
    assert store.embedded_uri() == f"sqlite:///{tmp_path}/mlflow.db"


def test_another_store_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").rename(tmp_path / "elsewhere.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    client = store.connect()
    experiment = client.get_experiment(store.experiment_id(client))
    assert experiment.name == "mine"
    assert "mlartifacts" not in experiment.artifact_location
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        (f"http://ada:hunter2@127.0.0.1:{CLOSED_PORT}/", f"http://127.0.0.1:{CLOSED_PORT}/"),
        ("nosuch://ada:hun@ter2@host", "nosuch://host"),
        ("http://ada:hunter2@127.0.0.1:99999", "http://127.0.0.1:99999"),
    ],
)
def test_a_store_that_does_not_answer_is_told_soon_and_without_the_password(
    uri: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with pytest.raises(
        UserError, match=f"^tracking store {place} cannot be used \\(.*; set MLFLOW_TRACKING_URI"
    ) as caught:
        store.connect()
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)
    for secret in ("ada", "hunter2", "ter2"):
        assert secret not in str(caught.value)


class GuardedServer:
    """As much of an MLflow server as a run needs, which wants a user and a password."""

    def __init__(self, user: str, password: str) -> None:
        wanted = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
        info = {"run_id": "0" * 32, "run_uuid": "0" * 32, "experiment_id": "1", "status": "RUNNING", "run_name": "a"}
        experiment = {"experiment_id": "1", "name": store.EXPERIMENT, "lifecycle_stage": "active"}
        body = {"experiments": [experiment], "experiment": experiment, "run": {"info": info, "data": {}}}
        self.accepted = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                accepted = handler.headers.get("Authorization") == wanted
                self.accepted += accepted
                handler.send_response(200 if accepted else 401)
                handler.send_header("Content-Type", "application/json")
                handler.end_headers()
                handler.wfile.write(json.dumps(body).encode() if accepted else b"You are not authenticated.")

            do_POST = do_PATCH = do_GET  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:
                """Print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "GuardedServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_no_output_holds_the_user_or_the_password(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow prints the address of every run that ends, with all that the tracking URI holds."""
    caplog.set_level(logging.DEBUG)
    with GuardedServer("ada@work", "hunt/er@2") as server:
        uri = f"http://{server.address}/mlflow"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada%40work:hunt%2Fer%402@{server.address}/mlflow")
        main(["ui"])
        run = logged_run("register")[1]
        with mlflow.start_run(run_id=run.info.run_id):
            pass
        accepted = server.accepted
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada%40work:wrong%2Fhunt@{server.address}/mlflow")
        with pytest.raises(SystemExit):
            main(["ui"])
        assert 0 < accepted == server.accepted
        assert os.environ["MLFLOW_TRACKING_URI"] == uri
    written = "".join(capfd.readouterr())
    assert written.count(f"{uri}/#/experiments/1/runs/{run.info.run_id}") == 2
    assert f"error: tracking store {uri} cannot be used (" in written
    assert "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN\n" in written
    for secret in ("ada", "hunt", "er@2", "er%402", base64.b64encode(b"ada@work:hunt/er@2").decode()):
        assert secret not in written + caplog.text


def test_a_user_without_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada@example.org/mlflow")
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: https://example\.org/mlflow has a user without a pass"):
        store.connect()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("at postgresql://ada:hun/t@er2@db:5432/runs, said", "at postgresql://db:5432/runs, said"),
        ("http://ada:hunter2@[::1]:5000/", "http://[::1]:5000/"),
        ("postgresql://db/runs?user=ada&password=hunter2&x=1", "postgresql://db/runs?user=...&password=...&x=1"),
        ("mysql://db/runs?sslpassword=hunter2", "mysql://db/runs?sslpassword=..."),
        ("models:/tales@champion", "models:/tales@champion"),
    ],
)
def test_a_text_is_cleaned_of_passwords(text: str, clean: str) -> None:
    assert store.without_password(text) == clean


def test_what_a_client_waits_for_later_is_not_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    store.connect()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "600"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_store_that_fails_while_a_run_is_written_is_told_in_one_line(tmp_path: Path) -> None:
    def log_to_a_spoiled_store() -> None:
        with store.store_errors(), runs.start_run("finetune", {}) as run:
            with sqlite3.connect(tmp_path / "mlflow.db") as database:
                database.execute("DROP TABLE metrics")
            run.log_metrics({"loss": 1.0})

    with pytest.raises(UserError) as caught:
        log_to_a_spoiled_store()
    assert str(caught.value).startswith(f"MLflow, tracking store sqlite:///{tmp_path}/mlflow.db: ")
    assert "no such table: metrics" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_that_is_not_there_is_not_made_by_a_reader(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").unlink()
    with pytest.raises(UserError, match="there is no tracking store here; go to the folder of the project, or set"):
        store.connect(create=False)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_make_the_store_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").unlink()
    processes = [
        subprocess.Popen([sys.executable, "-c", CONNECT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=90) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]


def test_a_deleted_experiment_is_told() -> None:
    client = store.connect()
    client.delete_experiment(store.experiment_id(client))
    with pytest.raises(UserError, match="'gpt2-pipeline' is deleted; run mlflow experiments restore -x 1, or"):
        store.experiment_id(client)


def test_a_run_has_the_parameters_that_made_it() -> None:
    parameters = {
        "base": {"scratch": {"layers": 4}, "revision": None},
        "finetune": {"samples": {"prompts": ["", "Ä\n"]}, "learning_rate": 3e-5},
        "samples": {"prompt_words": 6},
        "tune": {"trials": 24},
        "register": {"name": "tales"},
    }
    with runs.start_run("finetune", parameters) as run:
        pass
    assert run.client.get_run(run.run_id).data.params == {
        "base.scratch.layers": "4",
        "base.revision": "None",
        "finetune.samples.prompts": '["", "Ä\\n"]',
        "finetune.learning_rate": "3e-05",
    }
    with runs.start_run("register", parameters) as last:
        pass
    assert last.client.get_run(last.run_id).data.params == {
        name: str(value) for name, value in lineage.flatten(parameters).items()
    }


def test_every_section_has_its_place() -> None:
    assert sorted(runs.SECTIONS) == sorted(read_yaml(ROOT / PARAMS_FILE))


@pytest.mark.parametrize("stage", ["finetune", "tune"])
def test_a_resumed_run_keeps_its_parameters_whatever_has_changed(stage: str) -> None:
    """The fingerprint says that nothing has changed that counts: not a later section, nor the effect of an earlier."""
    first = {section: {"value": 1} for section in runs.SECTIONS}
    with pytest.raises(KeyboardInterrupt), runs.start_run(stage, first) as run:
        raise KeyboardInterrupt
    before = run.client.get_run(run.run_id).data.params
    for section in set(runs.SECTIONS) - {stage}:
        with runs.start_run(stage, {**first, section: {"value": 2, "more": 3}}, run_id=run.run_id):
            pass
        resumed = run.client.get_run(run.run_id)
        assert (resumed.info.status, resumed.data.params) == ("FINISHED", before)


def test_a_run_knows_its_stage_machine_and_libraries() -> None:
    _, run = logged_run()
    assert run.info.status == "FINISHED"
    assert run.data.tags[runs.STAGE_TAG] == "finetune"
    assert {"machine.cpu", "machine.platform", "machine.python", "library.mlflow", "library.torch"} <= set(
        run.data.tags
    )


def test_a_run_whose_stage_fails_is_marked_failed() -> None:
    with pytest.raises(KeyboardInterrupt), runs.start_run("finetune", {}) as run:
        raise KeyboardInterrupt
    assert run.client.get_run(run.run_id).info.status == "FAILED"


def test_a_run_whose_parameters_are_refused_is_marked_failed() -> None:
    with pytest.raises(MlflowException), runs.start_run("finetune", {"a" * 300: 1}):
        pass
    client = store.connect()
    (run,) = client.search_runs([store.experiment_id(client)])
    assert run.info.status == "FAILED"


def test_a_long_parameter_is_logged() -> None:
    with runs.start_run("finetune", {"prompts": ["x" * 20_000]}) as run:
        pass
    assert run.client.get_run(run.run_id).data.params["prompts"].startswith('["xxx')


def test_metrics_keep_their_steps() -> None:
    with runs.start_run("finetune", {}) as run:
        for step, loss in ((0, 3.0), (10, 2)):
            run.log_metrics({"loss": loss}, step)
    history = run.client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 3.0), (10, 2.0)]


def test_a_table_grows_by_rows(tmp_path: Path) -> None:
    with runs.start_run("finetune", {}) as run:
        run.log_table("samples.json", [{"step": 0, "text": "a"}, {"step": 0, "text": "b"}])
        run.log_table("samples.json", [])
        run.log_table("samples.json", [{"step": 8, "text": "c"}])
    (file,) = tmp_path.glob("mlartifacts/**/samples.json")
    assert json.loads(file.read_text()) == {"columns": ["step", "text"], "data": [[0, "a"], [0, "b"], [8, "c"]]}


def test_data_is_recorded_by_its_digest() -> None:
    digest = hashlib.sha256(b"tokens").hexdigest()[:36]
    with runs.start_run("finetune", {}) as run:
        run.log_dataset("train", digest, {"documents": "12"})
    (record,) = run.client.get_run(run.run_id).inputs.dataset_inputs
    assert (record.dataset.name, record.dataset.digest) == ("train", digest)
    assert [tag.value for tag in record.tags] == ["train"]
    assert json.loads(record.dataset.source) == {"tags": {"documents": "12"}}


def test_a_file_lies_in_the_folder_asked_for(tmp_path: Path) -> None:
    (tmp_path / "copies.csv").write_text("rank\n")
    with runs.start_run("evaluate", {}) as run:
        run.log_file(tmp_path / "copies.csv", "plots")
    assert [file.path for file in run.client.list_artifacts(run.run_id, "plots")] == ["plots/copies.csv"]


def trials_of(client: MlflowClient, run_id: str) -> list[Run]:
    return client.search_runs(
        [store.experiment_id(client)],
        filter_string=f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'",
        order_by=["attributes.start_time"],
    )


def test_a_trial_is_a_finished_run_below_its_search() -> None:
    with runs.start_run("tune", {}) as run:
        run.log_trial(3, {"top_k": 50}, {"distance": 1.5}, {"tune.state": "pruned"}, 12.5)
    (trial,) = trials_of(run.client, run.run_id)
    assert trial.info.run_name == "trial 3"
    assert trial.info.status == "FINISHED"
    assert trial.info.start_time == 12_500
    assert trial.data.params == {"top_k": "50"}
    assert trial.data.metrics == {"distance": 1.5}
    assert trial.data.tags[runs.TRIAL_TAG] == "3"
    assert trial.data.tags["tune.state"] == "pruned"


def test_trials_from_a_number_on_are_forgotten() -> None:
    with runs.start_run("tune", {}) as other:
        other.log_trial(2, {}, {}, {}, 0.0)
    with runs.start_run("tune", {}) as run:
        for number in range(4):
            run.log_trial(number, {}, {}, {}, 1.0 + number)
        # A child that is no trial stays.
        with runs.start_run("evaluate", {}, parent_run_id=run.run_id):
            pass
        run.forget_trials(2)
    names = [found.info.run_name for found in trials_of(run.client, run.run_id)]
    assert names == ["trial 0", "trial 1", f"evaluate {run.name}"]
    assert len(trials_of(other.client, other.run_id)) == 1


def test_a_run_is_found_by_stage_and_outputs(tmp_path: Path) -> None:
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "found.json").write_text("{}")
    client, parent = logged_run()
    assert runs.find_run(client, "tune", tmp_path / "tune") is None
    with runs.start_run("tune", {}, parent_run_id=parent.info.run_id) as first:
        first.tag_outputs(tmp_path / "tune")
    with runs.start_run("tune", {}, parent_run_id=parent.info.run_id) as second:
        second.tag_outputs(tmp_path / "tune")
    assert client.get_run(first.run_id).data.tags[MLFLOW_PARENT_RUN_ID] == parent.info.run_id
    # The newest of those that wrote the same.
    assert runs.find_run(client, "tune", tmp_path / "tune") == second.run_id
    client.delete_run(second.run_id)
    assert runs.find_run(client, "tune", tmp_path / "tune") == first.run_id
    assert runs.find_run(client, "evaluate", tmp_path / "tune") is None
    (tmp_path / "tune" / "found.json").write_text("{ }")
    assert runs.find_run(client, "tune", tmp_path / "tune") is None


def test_a_run_that_failed_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "tune").mkdir()
    with runs.start_run("tune", {}) as run:
        run.tag_outputs(tmp_path / "tune")
    assert runs.find_run(run.client, "tune", tmp_path / "tune") == run.run_id
    run.client.set_terminated(run.run_id, "FAILED")
    assert runs.find_run(run.client, "tune", tmp_path / "tune") is None


def test_the_store_holds_a_run_until_it_is_deleted() -> None:
    client, run = logged_run()
    assert runs.holds_run(run.info.run_id)
    client.delete_run(run.info.run_id)
    assert not runs.holds_run(run.info.run_id)
    assert not runs.holds_run("0" * 32)


def test_a_run_keeps_its_fingerprint() -> None:
    client, run = logged_run(fingerprint="f1")
    assert runs.fingerprint_of(client, run.info.run_id) == "f1"
    _, other = logged_run()
    assert runs.fingerprint_of(client, other.info.run_id) is None


def test_a_checkpoint_is_a_model_with_scores_on_its_data() -> None:
    with runs.start_run("finetune", {}) as run:
        run.log_dataset("validation", "ab" * 32, {})
        run.log_checkpoint(3, {"validation_loss": 2.5, "validation_perplexity": 12.0})
        run.log_checkpoint(6, {"validation_loss": 2.25, "validation_perplexity": 9.5})
    client = run.client
    found = client.search_logged_models([store.experiment_id(client)], "name = 'checkpoint-3'")
    assert [model.source_run_id for model in found] == [run.run_id]
    (model,) = found
    assert str(model.status) == "READY"
    scores = {own.key: (own.value, own.step, own.dataset_name, own.dataset_digest) for own in model.metrics}
    digest = ("ab" * 32)[:36]
    assert scores == {
        "validation_loss": (2.5, 3, "validation", digest),
        "validation_perplexity": (12.0, 3, "validation", digest),
    }
    history = client.get_metric_history(run.run_id, "validation_loss")
    assert [(point.step, point.value) for point in history] == [(3, 2.5), (6, 2.25)]


def test_a_resumed_run_logs_no_checkpoint_twice() -> None:
    with runs.start_run("finetune", {}) as run:
        run.log_checkpoint(3, {"validation_loss": 2.5})
    with runs.start_run("finetune", {}, run_id=run.run_id) as resumed:
        for step in (3, 6):
            resumed.log_checkpoint(step, {"validation_loss": 2.0})
    found = run.client.search_logged_models([store.experiment_id(run.client)])
    assert sorted(model.name for model in found) == ["checkpoint-3", "checkpoint-6"]


def test_a_checkpoint_that_a_killed_process_left_is_used_again() -> None:
    with runs.start_run("finetune", {}) as run:
        left = run.client.create_logged_model(run.experiment_id, "checkpoint-3", run.run_id)
        run.log_checkpoint(3, {"validation_loss": 2.5})
    (model,) = run.client.search_logged_models([run.experiment_id])
    assert (model.model_id, str(model.status)) == (left.model_id, "READY")


def test_a_parameter_of_any_name_is_logged() -> None:
    with runs.start_run("finetune", {"prepare": {"encoding": {"russian/*.txt": "koi8-r"}}}) as run:
        pass
    assert run.client.get_run(run.run_id).data.params == {"prepare.encoding.russian/_.txt": "koi8-r"}


def test_a_machine_that_cannot_be_watched_trains_nevertheless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As without any network interface.
    monkeypatch.setattr("psutil.net_io_counters", lambda *_, **__: None)
    with runs.start_run("finetune", {}) as run:
        run.log_metrics({"loss": 1.0})
    assert capsys.readouterr().err.startswith("system metrics are not recorded (AttributeError: ")


def test_a_child_has_the_name_of_its_parent() -> None:
    with runs.start_run("finetune", {"register": {"name": "tales"}}) as parent:
        pass
    _, child = logged_run("evaluate", parent_run_id=parent.run_id)
    assert child.info.run_name == "evaluate tales"
    assert child.data.tags["mlflow.source.name"] == "pipeline.stages.evaluate"


def test_a_description_has_a_section_per_stage() -> None:
    with runs.start_run("finetune", {}) as run:
        for heading, text in (("A", "one"), ("B", "two"), ("A", "three")):
            run.describe(heading, text)
    assert run.tags()["mlflow.note.content"] == "## A\n\nthree\n\n## B\n\ntwo"


@pytest.mark.parametrize(("stage", "is_monitored"), [("finetune", True), ("tune", True), ("evaluate", False)])
def test_long_stages_show_what_the_machine_does(
    stage: str, is_monitored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")

    def names(run: runs.RunLog) -> set[str]:
        return {name for name in run.client.get_run(run.run_id).data.metrics if name.startswith("system/")}

    with runs.start_run(stage, {}) as run:
        wait_s = time.monotonic() + 30
        while is_monitored and not names(run) and time.monotonic() < wait_s:
            time.sleep(0.05)
    assert ("system/cpu_utilization_percentage" in names(run)) == is_monitored
