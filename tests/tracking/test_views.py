"""How MLflow's pages open: the tags of an experiment."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from isolated_store import isolated_store

from pipeline.tracking import store
from pipeline.tracking.pages import is_server, runs_page, ui_url, version_page, where_to_look
from pipeline.tracking.views import COLUMNS, KIND, KIND_TAG, VIEW_TAG


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path) -> Iterator[None]:
    with isolated_store(tmp_path):
        yield


def test_an_experiment_opens_with_its_runs_and_a_view_of_them() -> None:
    client = store.connect()
    tags = client.get_experiment(store.experiment_id(client)).tags
    assert tags[KIND_TAG] == KIND
    view = json.loads(tags[VIEW_TAG])
    assert view["name"] == "Fine-tunings"
    columns = json.loads(view["state"])["selectedColumns"]
    assert "metrics.`test_bits_per_byte`" in columns
    assert len(columns) == sum(map(len, COLUMNS.values()))
    # The longest that MLflow's store takes.
    assert len(tags[VIEW_TAG]) <= 5000


def test_an_experiment_of_an_older_version_gets_the_view() -> None:
    client = store.connect()
    experiment = client.create_experiment(store.EXPERIMENT, tags={"mlflow.note.content": "Ours."})
    assert store.experiment_id(client) == experiment
    tags = client.get_experiment(experiment).tags
    assert VIEW_TAG in tags
    assert tags["mlflow.note.content"] == "Ours."


def test_what_somebody_set_stays() -> None:
    client = store.connect()
    experiment = client.create_experiment(store.EXPERIMENT, tags={KIND_TAG: "genai_development"})
    assert store.experiment_id(client) == experiment
    assert client.get_experiment(experiment).tags == {KIND_TAG: "genai_development"}


def test_pages_are_at_the_server_or_at_ours() -> None:
    assert [is_server(uri) for uri in ("http://a", "https://a/b", "sqlite:///a.db", "postgresql://a")] == [
        *(True, True),
        *(False, False),
    ]
    assert ui_url("https://mlflow.example/team/") == "https://mlflow.example/team"
    assert ui_url("sqlite:///mlflow.db") == "http://127.0.0.1:5000"
    assert version_page("our tales", 2) == "#/models/our%20tales/versions/2"


def test_a_registration_says_where_to_look() -> None:
    lines = where_to_look("sqlite:///mlflow.db", "1", "tales", 2).splitlines()
    assert lines == [
        "make ui shows these pages:",
        "  http://127.0.0.1:5000/#/models/tales/versions/2  the model card",
        f"  http://127.0.0.1:5000/{runs_page('1')}  the runs",
    ]
    assert where_to_look("http://host/", "1", "tales", 2).splitlines() == [
        "  http://host/#/models/tales/versions/2  the model card",
        f"  http://host/{runs_page('1')}  the runs",
    ]
