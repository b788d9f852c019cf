from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from isolated_store import isolated_store
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from unused_model import log_unused_model

from pipeline.errors import UserError
from pipeline.tracking import registry, runs, store
from pipeline.tracking.registry import (
    Score,
    fetch_model,
    find_objection,
    promote,
    score_of,
    set_alias,
    set_card,
)

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


def score(bits_per_byte: float, split: str = "a", protocol: str = "stride_tokens 62") -> Score:
    return Score(split, protocol, bits_per_byte)


def new_version(client: MlflowClient, own: Score | None) -> ModelVersion:
    """A version without files, tagged as `register` tags one."""
    return client.create_model_version(NAME, source="nowhere", tags={} if own is None else own.tags())


def registered(client: MlflowClient, own: Score) -> str:
    """The alias that a version of this score gets."""
    return set_alias(client, new_version(client, own), own).partition(":")[0]


def aliases(client: MlflowClient) -> dict[str, int]:
    return {alias: int(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


@pytest.mark.parametrize(
    ("candidate", "champion", "objection"),
    [
        (score(2.0), score(2.1), None),
        (score(2.0), score(2.0), None),
        (score(2.0), score(1.9), "its bits per byte are 2.0000, the champion's 1.9000"),
        (score(2.0), score(2.1, "b"), "the champion was scored on other texts; the two are not compared"),
        (
            score(2.0, protocol="stride_tokens 8"),
            score(2.1),
            "the champion was scored with stride_tokens 62, not stride_tokens 8; the two are not compared",
        ),
        (score(2.0), None, "the champion has no score to compare"),
        # A score that is not a number is no better than any.
        (score(float("nan")), score(2.0), "its bits per byte are nan, the champion's 2.0000"),
    ],
)
def test_champion_is_no_worse_on_the_same_texts_in_the_same_way(
    candidate: Score, champion: Score | None, objection: str | None
) -> None:
    assert find_objection(candidate, champion) == objection


def test_the_first_version_is_champion(client: MlflowClient) -> None:
    assert registered(client, score(2.0)) == "champion"
    assert aliases(client) == {"champion": 1}


def test_a_worse_version_becomes_challenger_and_the_champion_stays(client: MlflowClient) -> None:
    registered(client, score(2.0))
    assert registered(client, score(2.1)) == "challenger"
    assert aliases(client) == {"champion": 1, "challenger": 2}
    assert registered(client, score(2.2)) == "challenger"
    assert aliases(client) == {"champion": 1, "challenger": 3}


def test_a_better_version_takes_the_champions_place(client: MlflowClient) -> None:
    registered(client, score(2.0))
    registered(client, score(2.1))
    assert registered(client, score(1.9)) == "champion"
    assert aliases(client) == {"champion": 3, "challenger": 2}


@pytest.mark.parametrize("own", [score(1.0, "b"), score(1.0, protocol="stride_tokens 8")])
def test_a_version_that_cannot_be_compared_becomes_challenger(client: MlflowClient, own: Score) -> None:
    registered(client, score(2.0))
    alias = set_alias(client, new_version(client, own), own)
    assert alias.startswith("challenger: the champion was scored ")
    assert alias.endswith("; python -m pipeline promote makes it the champion")
    assert aliases(client) == {"champion": 1, "challenger": 2}


def test_a_champion_without_a_score_stays(client: MlflowClient) -> None:
    client.set_registered_model_alias(NAME, "champion", new_version(client, None).version)
    assert registered(client, score(1.0)) == "challenger"
    assert aliases(client) == {"champion": 1, "challenger": 2}


def test_the_champion_stays_when_it_is_registered_again(client: MlflowClient) -> None:
    registered(client, score(float("nan")))
    version = client.get_model_version(NAME, "1")
    assert set_alias(client, version, score(float("nan"))) == "champion"


@pytest.mark.parametrize(
    ("deleted", "bits_per_byte", "champion"),
    [("alias", 1.7, 1), ("alias", 1.0, 7), ("version", 1.7, 7), ("version", 1.8, 7), ("version", 1.9, 2)],
)
def test_the_best_version_left_follows_a_champion_that_was_deleted(
    deleted: str, bits_per_byte: float, champion: int, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [score(1.0), score(1.8), score(1.9), score(0.5, "b"), score(0.5, protocol="stride_tokens 8"), None]
    for own in left:
        new_version(client, own)
    client.set_registered_model_alias(NAME, "champion", "1")
    monkeypatch.setattr(registry, "_has_files", lambda version: True)
    if deleted == "version":
        client.delete_model_version(NAME, "1")
    else:
        client.delete_registered_model_alias(NAME, "champion")
    registered(client, score(bits_per_byte))
    assert aliases(client) == {"champion": champion} | ({} if champion == 7 else {"challenger": 7})


def test_a_version_without_files_follows_no_champion(client: MlflowClient) -> None:
    new_version(client, score(1.0))
    assert registered(client, score(2.0)) == "champion"


def test_the_model_has_the_card_of_its_champion(client: MlflowClient) -> None:
    first, second = new_version(client, score(2.0)), new_version(client, score(1.9))
    set_alias(client, first, score(2.0))
    set_card(client, first, "the first")
    assert client.get_model_version(NAME, "1").description == "the first"
    assert client.get_registered_model(NAME).description == "the first"
    # Set before it is champion, as when a challenger is promoted.
    set_card(client, second, "the second")
    assert client.get_registered_model(NAME).description == "the first"
    set_alias(client, second, score(1.9))
    assert client.get_registered_model(NAME).description == "the second"
    set_card(client, second, "the second, described again")
    client.delete_model_version(NAME, "1")
    assert client.get_registered_model(NAME).description == "the second, described again"


def test_a_description_that_somebody_wrote_stays(client: MlflowClient) -> None:
    first = new_version(client, score(2.0))
    set_alias(client, first, score(2.0))
    client.update_registered_model(NAME, "Our tales.")
    set_card(client, first, "the first")
    set_alias(client, first, score(2.0))
    assert client.get_model_version(NAME, "1").description == "the first"
    assert client.get_registered_model(NAME).description == "Our tales."


def test_the_version_of_the_tree_is_promoted_whatever_its_score(client: MlflowClient, tmp_path: Path) -> None:
    with runs.start_run("register", {}) as run:
        uri = log_unused_model(run.run_id, tmp_path, {})
    for fingerprint, bits_per_byte in (("old", 2.1), ("new", 2.0)):
        tags = score(bits_per_byte).tags() | {registry.FINGERPRINT_TAG: fingerprint}
        version = mlflow.register_model(uri, NAME, tags=tags)
        set_alias(client, version, score(bits_per_byte))
    assert aliases(client) == {"champion": 2}
    assert int(promote(client, NAME, "old").version) == 1
    assert aliases(client) == {"champion": 1}
    client.set_registered_model_alias(NAME, "challenger", "2")
    promote(client, NAME, "new")
    assert aliases(client) == {"champion": 2}
    with pytest.raises(UserError, match=f"^{NAME}: the registry does not hold this version; run python -m pipeline"):
        promote(client, NAME, "other")


def test_a_score_is_read_back_to_the_last_digit(client: MlflowClient) -> None:
    own = score(2.1234567890123457)
    version = new_version(client, own)
    assert score_of(client.get_model_version(NAME, version.version)) == own


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
    registered(client, score(2.0))
    with pytest.raises(UserError, match="the registry does not hold it"):
        fetch_model(f"models:/{NAME}@champion")
