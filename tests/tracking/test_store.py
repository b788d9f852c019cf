"""Stores that have aged: of another MLflow, damaged, read-only, with deleted runs; and a real MLflow server."""

import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
import requests
from isolated_store import isolated_store
from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.tracking import runs, store

OLDER = "0584bdc529eb"
"""The schema of MLflow 2.22."""
NEWER = "feedbeef0123"
START_S = 120


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path) -> Iterator[None]:
    with isolated_store(tmp_path):
        yield


def schema(file: Path) -> str:
    with closing(sqlite3.connect(file)) as database:
        return str(database.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def set_schema(file: Path, version: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", [version])
        # Where a table is missing, MLflow migrates without a word.
        database.execute("DROP TABLE webhooks")


@pytest.mark.parametrize("create", [True, False])
def test_a_store_of_an_older_mlflow_is_not_migrated_without_a_word(create: bool, tmp_path: Path) -> None:
    set_schema(tmp_path / "mlflow.db", OLDER)
    with pytest.raises(UserError) as caught:
        store.connect(create=create)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert str(caught.value).startswith(f"tracking store {uri}: an older MLflow than MLflow {mlflow.__version__} made")
    assert str(caught.value).endswith(f"cannot read it afterwards, and run: mlflow db upgrade {uri}")
    assert schema(tmp_path / "mlflow.db") == OLDER


def test_another_store_of_an_older_mlflow_is_named_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").rename(tmp_path / "other.db")
    set_schema(tmp_path / "other.db", OLDER)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    with pytest.raises(UserError, match=r'run: mlflow db upgrade "\$MLFLOW_TRACKING_URI"$'):
        store.connect()


def test_a_store_of_a_newer_mlflow_needs_its_server(tmp_path: Path) -> None:
    set_schema(tmp_path / "mlflow.db", NEWER)
    with pytest.raises(UserError, match=rf"a newer MLflow than .* made it \(schema {NEWER}\); run mlflow server of"):
        store.connect()
    assert schema(tmp_path / "mlflow.db") == NEWER


def test_a_file_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"cannot be used \(file is not a database\); if it is damaged, move it away"):
        store.connect()
    assert (tmp_path / "mlflow.db").read_bytes() == b"no database" * 100


def test_a_store_whose_creation_is_cut_off_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow cannot finish most of those that it left half-made."""
    (tmp_path / "mlflow.db").unlink()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, "search_experiments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.connect()
    assert [file.name for file in tmp_path.glob("mlflow.db*")] == ["mlflow.db.lock"]


def test_a_store_that_cannot_be_written_to_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store.experiment_id(store.connect())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{tmp_path}/mlflow.db?mode=ro&uri=true")
    with pytest.raises(UserError, match="attempt to write a readonly database"):
        write_run()
    assert "Traceback" not in capfd.readouterr().err


def write_run() -> str:
    """Write a run as a stage does."""
    with store.store_errors(), runs.start_run("finetune", {}) as run:
        run.log_metrics({"loss": 1.0})
        Path("note.txt").write_text("kept")
        run.log_file(Path("note.txt"))
    return run.run_id


def test_a_run_that_is_deleted_while_it_is_written_is_one_line() -> None:
    def write() -> None:
        with store.store_errors(), runs.start_run("finetune", {}) as run:
            run.client.delete_run(run.run_id)
            run.log_metrics({"loss": 1.0})

    with pytest.raises(UserError, match=r"Current state is deleted; run the command again once that is fixed$"):
        write()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an MLflow server, under whose path `/mlflow` everything is, files too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    command += ["--serve-artifacts", "--static-prefix", "/mlflow"]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/mlflow"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code > 0
    except requests.ConnectionError:
        return False


@pytest.mark.slow
def test_a_server_behind_a_path_holds_runs_and_their_files(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    run_id = write_run()
    client = store.connect()
    assert client.get_run(run_id).info.artifact_uri.startswith("mlflow-artifacts:")
    assert Path(client.download_artifacts(run_id, "note.txt")).read_text() == "kept"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.removesuffix("/mlflow"))
    with pytest.raises(UserError, match=r"the server has no /api/\S+: it is older than MLflow 3, or .* lacks its path"):
        store.connect()
