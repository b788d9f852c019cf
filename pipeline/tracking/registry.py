"""The model registry: finding versions by what they are made of, and the rule by which aliases move."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, get_model_info
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipeline.decoding import ModelDecoding, read_decoding
from pipeline.errors import UserError
from pipeline.tracking.store import store_lock
from pipeline.tracking.tags import FINGERPRINT_TAG

CHAMPION = "champion"
CHALLENGER = "challenger"
TEST_SPLIT_TAG = "pipeline.test_split_sha256"
PROTOCOL_TAG = "pipeline.test_protocol"
BITS_PER_BYTE_TAG = "pipeline.test_bits_per_byte"
RUN_TAG = "pipeline.run_id"
CARD_TAG = "pipeline.card"
"""The tag of a registered model with the digest of the card that describes it."""
_ABSENT = (ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE))
"""The error codes with which a store says that it has no such model, or no such alias."""


@dataclass(frozen=True)
class Score:
    """The figure that decides between two versions: bits per byte, on which texts, and how it was taken."""

    test_split_sha256: str
    """The digest of the test split's texts: see `lineage.digest_texts`."""
    protocol: str
    """What the figure depends on besides model and texts, such as `precision float32, stride_tokens 256`."""
    bits_per_byte: float

    def tags(self) -> dict[str, str]:
        """Return the tags of a version from which `score_of` reads the score."""
        values = (self.test_split_sha256, self.protocol, repr(self.bits_per_byte))
        return dict(zip((TEST_SPLIT_TAG, PROTOCOL_TAG, BITS_PER_BYTE_TAG), values, strict=True))


def find_objection(candidate: Score, champion: Score | None) -> str | None:
    """Return why a version whose parity holds does not replace a champion; None if it does.

    It does if both were scored on the same texts in the same way, and its bits per byte are no worse. Other scores are
    not compared, and a champion that somebody else registered has no score.
    """
    if champion is None:
        return "the champion has no score to compare"
    if (difference := _find_difference(candidate, champion)) is not None:
        return f"{difference}; the two are not compared"
    if candidate.bits_per_byte <= champion.bits_per_byte:
        return None
    return f"its bits per byte are {candidate.bits_per_byte:.4f}, the champion's {champion.bits_per_byte:.4f}"


def _find_difference(candidate: Score, champion: Score) -> str | None:
    """Return why the two scores cannot be compared; None if they can."""
    if champion.test_split_sha256 != candidate.test_split_sha256:
        return "the champion was scored on other texts"
    if champion.protocol != candidate.protocol:
        return f"the champion was scored with {champion.protocol}, not {candidate.protocol}"
    return None


def find_version(client: MlflowClient, name: str, fingerprint: str) -> ModelVersion | None:
    """Return the newest version with this fingerprint whose files still exist, or None."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`{FINGERPRINT_TAG}` = '{fingerprint}'")
    newest_first = sorted(versions, key=lambda version: -int(version.version))
    return next(filter(_has_files, newest_first), None)


def _has_files(version: ModelVersion) -> bool:
    try:
        get_model_info(f"models:/{version.name}/{version.version}")
    except (MlflowException, OSError):
        return False
    return True


def log_version(
    run_id: str,
    name: str,
    *,
    model_file: Path,
    code_folder: Path,
    artifacts: dict[str, str],
    signature: ModelSignature,
    model_config: dict[str, Any],
    input_example: tuple[list[str], dict[str, Any]],
    requirements: list[str],
    params: dict[str, Any],
    tags: dict[str, str],
) -> tuple[ModelVersion, str]:
    """Log a pyfunc from code under the run, and register it as the next version of `name`.

    The logged model has the parameters of the run, and `params`. Returns the version, and the id of the logged model.
    """
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            # MLflow takes fewer characters in the name of a logged model than in that of a registered one.
            name=name.replace(".", "-"),
            python_model=str(model_file),
            code_paths=[str(code_folder)],
            artifacts=artifacts,
            signature=signature,
            model_config=model_config,
            pip_requirements=requirements,
            input_example=input_example,
            params=params,
        )
    return mlflow.register_model(logged.model_uri, name, tags=tags), logged.model_id


def set_card(client: MlflowClient, version: ModelVersion, card: str) -> None:
    """Describe a version by its model card; if it is the champion, describe the model by it, too."""
    client.update_model_version(version.name, version.version, card)
    if _alias(client, version.name, CHAMPION) == int(version.version):
        _show_card(client, version.name, card)


def _show_card(client: MlflowClient, name: str, card: str) -> None:
    """Describe the model by a card, unless somebody has described it otherwise since the last one."""
    model = client.get_registered_model(name)
    if not model.description or model.tags.get(CARD_TAG) == _digest(model.description):
        client.update_registered_model(name, card)
        client.set_registered_model_tag(name, CARD_TAG, _digest(card))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _alias(client: MlflowClient, name: str, alias: str) -> int | None:
    """Return the number of the version that an alias points to; None if there is no such alias."""
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else int(number)


def set_alias(client: MlflowClient, version: ModelVersion, score: Score) -> str:
    """Point `champion`, or else `challenger`, at the version, under a lock. Return the alias, and why if challenger."""
    with store_lock():
        champion = _find_champion(client, version, score)
        objection = None
        if champion is not None and int(champion.version) != int(version.version):
            objection = find_objection(score, score_of(champion))
        if champion is None or objection is None:
            _make_champion(client, version)
            return CHAMPION
        _make_champion(client, champion)
        client.set_registered_model_alias(version.name, CHALLENGER, version.version)
        return f"{CHALLENGER}: {objection}; python -m pipeline promote makes it the champion"


def promote(client: MlflowClient, name: str, fingerprint: str) -> ModelVersion:
    """Point `champion` at the version with this fingerprint. Raises `UserError` if the registry does not hold it."""
    with store_lock():
        version = find_version(client, name, fingerprint)
        if version is None:
            raise UserError(f"{name}: the registry does not hold this version; run python -m pipeline restore")
        _make_champion(client, version)
    return version


def _find_champion(client: MlflowClient, version: ModelVersion, score: Score) -> ModelVersion | None:
    """Return the champion, or if its alias or version was deleted, the best other version with a comparable score."""
    aliases = client.get_registered_model(version.name).aliases
    if CHAMPION in aliases:
        return client.get_model_version(version.name, aliases[CHAMPION])
    others = [
        (own.bits_per_byte, -int(other.version), other)
        for other in client.search_model_versions(f"name = '{version.name}'")
        if int(other.version) != int(version.version)
        and (own := score_of(other)) is not None
        and _find_difference(score, own) is None
        and _has_files(other)
    ]
    return min(others)[2] if others else None


def _make_champion(client: MlflowClient, version: ModelVersion) -> None:
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    if _alias(client, version.name, CHALLENGER) == int(version.version):
        client.delete_registered_model_alias(version.name, CHALLENGER)
    if card := client.get_model_version(version.name, version.version).description:
        _show_card(client, version.name, card)


def score_of(version: ModelVersion) -> Score | None:
    """Return the score that `register` wrote on a version; None if somebody else registered it."""
    tags = version.tags
    if not {TEST_SPLIT_TAG, PROTOCOL_TAG, BITS_PER_BYTE_TAG} <= tags.keys():
        return None
    return Score(tags[TEST_SPLIT_TAG], tags[PROTOCOL_TAG], float(tags[BITS_PER_BYTE_TAG]))


def resolve(client: MlflowClient, uri: str) -> ModelVersion:
    """Return the version that `models:/NAME@ALIAS` or `models:/NAME/N` names. Raises `UserError` if there is none."""
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if parts is None:
        raise UserError(f"{uri}: is not a registry URI; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts.groups()
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        raise UserError(f"{uri}: the registry does not hold it ({str(error).splitlines()[0]})") from error


def fetch_model(uri: str, into: Path | None = None) -> tuple[Path, ModelDecoding]:
    """Return the engine folder and the decoding of a registered model, `models:/NAME@ALIAS` or `models:/NAME/N`.

    They are in `into` if it is given. The model's code is not read. Raises `UserError` if the registry does not hold
    the model, or if `register` did not make it.
    """
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=None if into is None else str(into)))
    except (MlflowException, OSError) as error:
        raise UserError(f"{uri}: the registry does not hold it ({str(error).splitlines()[0]})") from error
    artifacts = Model.load(str(folder)).flavors.get("python_function", {}).get("artifacts", {})
    if not {"engine", "decoding"} <= artifacts.keys():
        raise UserError(f"{uri}: contains no engine with its decoding; name a model that the register stage made")
    paths = {name: folder / artifact["path"] for name, artifact in artifacts.items()}
    return paths["engine"], read_decoding(paths["decoding"], paths.get("presets"))
