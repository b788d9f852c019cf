from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from isolated_store import isolated_store
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.errors import UserError
from pipeline.tracking import registry, runs, store
from pipeline.tracking.registry import Score, deserves_champion, fetch_model, score_of, set_alias

NAME = "harbour-tales"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path) -> Iterator[None]:
    with isolated_store(tmp_path):
        yield


@pytest.fixture
def client() -> MlflowClient:
    client = store.connect()
    client.create_registered_model(NAME)
    return client


def new_version(client: MlflowClient, score: Score | None) -> ModelVersion:
    """A version without files, tagged as `register` tags one."""
    tags = {}
    if score is not None:
        tags = {
            registry.TEST_SPLIT_TAG: score.test_split_sha256,
            registry.BITS_PER_BYTE_TAG: repr(score.bits_per_byte),
        }
    return client.create_model_version(NAME, source="nowhere", tags=tags)


def registered(client: MlflowClient, score: Score) -> str:
    """The alias that a version of this score gets."""
    return set_alias(client, new_version(client, score), score)


def aliases(client: MlflowClient) -> dict[str, int]:
    return {alias: int(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


@pytest.mark.parametrize(
    ("candidate", "champion", "deserves"),
    [
        (Score("a", 2.0), None, True),
        (Score("a", 2.0), Score("a", 2.1), True),
        (Score("a", 2.0), Score("a", 2.0), True),
        (Score("a", 2.0), Score("a", 1.9), False),
        (Score("a", 2.0), Score("b", 1.9), True),
        (Score("a", 2.0), Score("b", 2.1), True),
        # A score that is not a number is no better than any.
        (Score("a", float("nan")), Score("a", 2.0), False),
    ],
)
def test_champion_is_no_worse_on_the_same_split(candidate: Score, champion: Score | None, deserves: bool) -> None:
    assert deserves_champion(candidate, champion) is deserves


def test_the_first_version_is_champion(client: MlflowClient) -> None:
    assert registered(client, Score("a", 2.0)) == "champion"
    assert aliases(client) == {"champion": 1}


def test_a_worse_version_becomes_challenger_and_the_champion_stays(client: MlflowClient) -> None:
    registered(client, Score("a", 2.0))
    assert registered(client, Score("a", 2.1)) == "challenger"
    assert aliases(client) == {"champion": 1, "challenger": 2}
    assert registered(client, Score("a", 2.2)) == "challenger"
    assert aliases(client) == {"champion": 1, "challenger": 3}


def test_a_better_version_takes_the_champions_place(client: MlflowClient) -> None:
    registered(client, Score("a", 2.0))
    registered(client, Score("a", 2.1))
    assert registered(client, Score("a", 1.9)) == "champion"
    assert aliases(client) == {"champion": 3, "challenger": 2}


def test_a_champion_without_a_score_yields(client: MlflowClient) -> None:
    client.set_registered_model_alias(NAME, "champion", new_version(client, None).version)
    assert registered(client, Score("a", 9.0)) == "champion"
    assert aliases(client) == {"champion": 2}


def test_a_score_is_read_back_to_the_last_digit(client: MlflowClient) -> None:
    score = Score("a", 2.1234567890123457)
    version = new_version(client, score)
    assert score_of(client.get_model_version(NAME, version.version)) == score


def test_a_version_that_somebody_else_registered_has_no_score(client: MlflowClient) -> None:
    version = new_version(client, None)
    assert score_of(client.get_model_version(NAME, version.version)) is None


@pytest.mark.parametrize("uri", ["models:/nobody@champion", f"models:/{NAME}@challenger", f"models:/{NAME}/7"])
def test_a_model_that_the_registry_does_not_hold_is_told(uri: str, client: MlflowClient) -> None:
    with pytest.raises(UserError, match=rf"^{uri}: the registry does not hold it \(") as caught:
        fetch_model(uri)
    assert "\n" not in str(caught.value)


def test_a_model_that_register_did_not_make_is_told(client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "from mlflow.models import set_model\n"
        "from mlflow.pyfunc.model import PythonModel\n\n\n"
        "class Echo(PythonModel):\n"
        "    def predict(self, model_input: list[str]) -> list[str]:\n"
        "        return model_input\n\n\n"
        "set_model(Echo())\n"
    )
    with runs.start_run("register", {}) as run, mlflow.start_run(run_id=run.run_id):
        logged = mlflow.pyfunc.log_model(name="echo", python_model=str(tmp_path / "model.py"), pip_requirements=[])
    mlflow.register_model(logged.model_uri, NAME)
    with pytest.raises(UserError, match=rf"^models:/{NAME}/1: contains no engine with its decoding; name a model that"):
        fetch_model(f"models:/{NAME}/1")


def test_a_version_whose_files_are_gone_is_told(client: MlflowClient) -> None:
    registered(client, Score("a", 2.0))
    with pytest.raises(UserError, match="the registry does not hold it"):
        fetch_model(f"models:/{NAME}@champion")
