"""Versions from a real registry: what is fetched of them, and an alias that moves while a server runs."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from isolated_store import isolated_store
from mlflow import MlflowClient
from served_model import PATIENCE_S, running_server, wait_for

from pipeline.decoding import ModelDecoding, SamplingParams
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.serving import pyfunc
from pipeline.serving.served import RegistrySource, source_of
from pipeline.stages.register import SIGNATURE
from pipeline.tracking import store
from pipeline.tracking.registry import RUN_TAG, resolve

NAME = "tides"
URI = f"models:/{NAME}@champion"
OWN = SamplingParams(temperature=0.7, max_new_tokens=9)
DECODING = ModelDecoding(OWN, {"faithful": SamplingParams(temperature=0.3, max_new_tokens=8)})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    with isolated_store(tmp_path_factory.mktemp("store")):
        yield store.connect()


def register(client: MlflowClient, engine: Path | None, *, has_presets: bool = True) -> str:
    """Register a version, also as the stage did before presets existed, or of a foreign model. Return its number."""
    decoding, presets = Path("decoding.json"), Path("presets.json")
    write_json(decoding, OWN.to_mapping())
    write_json(presets, {name: preset.to_mapping() for name, preset in DECODING.presets.items()})
    artifacts = {} if engine is None else {"engine": str(engine), "decoding": str(decoding)}
    if has_presets:
        artifacts["presets"] = str(presets)
    with mlflow.start_run(experiment_id=store.experiment_id(client)) as run:
        mlflow.log_param("base.source", "gpt2")
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=pyfunc.__file__,
            artifacts=artifacts,
            signature=SIGNATURE,
            model_config={"provider": "auto", "precision": "auto", "threads": None},
            pip_requirements=[],
        )
    tags = {RUN_TAG: run.info.run_id, "git.commit": "c0ffee", "git.dirty": "false", "dvc.data_md5": "d41d"}
    return str(mlflow.register_model(logged.model_uri, NAME, tags=tags).version)


@pytest.fixture(scope="module")
def versions(client: MlflowClient, tiny_engine_folder: Path) -> list[str]:
    """A version that can be served, one from before presets existed, and one that cannot be served."""
    return [
        register(client, tiny_engine_folder),
        register(client, tiny_engine_folder, has_presets=False),
        register(client, None),
    ]


def move(client: MlflowClient, version: str) -> None:
    client.set_registered_model_alias(NAME, "champion", version)


def test_a_version_is_fetched_with_its_lineage(client: MlflowClient, versions: list[str]) -> None:
    move(client, versions[0])
    source = source_of(URI, None, "http://mlflow.example/")
    assert source.name == NAME
    assert source.newest() == versions[0]
    files = source.fetch(versions[0])
    assert files.decoding == DECODING
    assert (files.engine / "engine.json").is_file()
    run_id = files.lineage["run_id"]
    experiment = client.get_run(str(run_id)).info.experiment_id
    assert files.lineage["run_url"] == f"http://mlflow.example/#/experiments/{experiment}/runs/{run_id}"
    assert files.lineage["git_commit"] == "c0ffee"
    assert files.lineage["data_md5"] == "d41d"
    assert files.lineage["base"] == "gpt2"
    files.remove()
    assert not files.engine.exists()


def test_a_version_from_before_presets_existed_has_none(client: MlflowClient, versions: list[str]) -> None:
    files = RegistrySource(client, f"models:/{NAME}/{versions[1]}", "http://mlflow.example").fetch(versions[1])
    assert files.decoding == ModelDecoding(OWN)
    files.remove()


def test_the_server_follows_the_alias(client: MlflowClient, versions: list[str], caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "pipeline")
    move(client, versions[0])
    source = RegistrySource(client, URI, "http://mlflow.example")
    with running_server(Path(), source=source) as running:
        card = requests.get(f"{running.url}/v1/models", timeout=PATIENCE_S).json()["data"][0]
        assert (card["id"], card["version"], card["decoding"]) == (NAME, versions[0], OWN.to_mapping())
        assert card["presets"] == {"faithful": DECODING.presets["faithful"].to_mapping()}
        assert running.post(prompt="a", preset="faithful").status_code == 200
        move(client, versions[1])
        wait_for(lambda: running.served.current.version == versions[1])
        assert running.post(prompt="a").json()["system_fingerprint"] == f"{NAME}/{versions[1]}/float32"
        assert running.post(prompt="a", model=f"{NAME}/{versions[1]}").status_code == 200
        card = requests.get(f"{running.url}/v1/models/{NAME}", timeout=PATIENCE_S).json()
        assert (card["decoding"], card["presets"]) == (OWN.to_mapping(), {})
        error = running.post(prompt="a", preset="faithful").json()["error"]
        assert (error["param"], error["message"]) == (
            "preset",
            "preset: this model has no presets, got 'faithful'; leave it out",
        )
        assert running.post(prompt="a", model=f"{NAME}/{versions[0]}").status_code == 404
        move(client, versions[2])
        wait_for(lambda: any("contains no engine with its decoding" in one.getMessage() for one in caplog.records))
        client.delete_registered_model_alias(NAME, "champion")
        wait_for(lambda: any("does not hold it" in one.getMessage() for one in caplog.records))
        assert running.post(prompt="a").json()["system_fingerprint"] == f"{NAME}/{versions[1]}/float32"
        move(client, versions[0])
        wait_for(lambda: running.served.current.version == versions[0])


@pytest.mark.parametrize("uri", ["models:/nobody@champion", "models:/nobody/1", f"models:/{NAME}@nobody"])
def test_what_the_registry_does_not_hold_is_refused(uri: str, client: MlflowClient, versions: list[str]) -> None:
    with pytest.raises(UserError, match=f"^{uri}: the registry does not hold it"):
        resolve(client, uri)


@pytest.mark.parametrize("uri", ["models:/tides", "models:/tides/latest", "runs:/1/model", "models:/a@b@c"])
def test_what_names_no_version_is_refused(uri: str, client: MlflowClient) -> None:
    with pytest.raises(UserError, match="is not a registry URI; write models:/NAME@ALIAS"):
        resolve(client, uri)


def test_copies_of_killed_servers_are_removed(
    client: MlflowClient, versions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    move(client, versions[0])
    code = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\nfrom pipeline.serving.served import _own_folder\n"
    code += "with _own_folder() as folder: print(folder, flush=True); input()"
    servers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, alive = (Path(str(server.stdout and server.stdout.readline()).strip()) for server in servers)
    (killed / "weights").write_text("")
    servers[0].kill()
    servers[0].wait()
    old, new = tmp_path / "pipeline-served-old", tmp_path / "pipeline-served-new"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    source = RegistrySource(client, URI, "")
    assert sorted(tmp_path.iterdir()) == sorted([alive, new])
    copy = source.fetch(versions[0])
    assert copy.engine.is_dir()
    RegistrySource(client, URI, "")
    assert copy.engine.is_dir()
    copy.remove()
    servers[1].communicate("\n", timeout=PATIENCE_S)
    assert list(tmp_path.iterdir()) == [new]
