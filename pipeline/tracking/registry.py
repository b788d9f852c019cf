"""The model registry: finding versions by what they are made of, and the rule by which aliases move."""

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

CHAMPION = "champion"
CHALLENGER = "challenger"
FINGERPRINT_TAG = "pipeline.fingerprint"
TEST_SPLIT_TAG = "pipeline.test_split_sha256"
BITS_PER_BYTE_TAG = "pipeline.test_bits_per_byte"
RUN_TAG = "pipeline.run_id"
_ABSENT = (ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE))
"""The error codes with which a store says that it has no such model, or no such alias."""


@dataclass(frozen=True)
class Score:
    """The figure that decides between two versions: bits per byte, and the test split it was taken on."""

    test_split_sha256: str
    bits_per_byte: float


def deserves_champion(candidate: Score, champion: Score | None) -> bool:
    """Return whether a version whose parity holds becomes the champion.

    It does if there is no champion, if the champion was scored on another test split, so that the two cannot be
    compared, or if its bits per byte on the same split are no worse.
    """
    return (
        champion is None
        or champion.test_split_sha256 != candidate.test_split_sha256
        or candidate.bits_per_byte <= champion.bits_per_byte
    )


def find_version(client: MlflowClient, name: str, fingerprint: str) -> ModelVersion | None:
    """Return the newest version with this fingerprint whose files still exist, or None."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`{FINGERPRINT_TAG}` = '{fingerprint}'")
    for version in sorted(versions, key=lambda version: -int(version.version)):
        try:
            get_model_info(f"models:/{name}/{version.version}")
        except (MlflowException, OSError):
            continue
        return version
    return None


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
    tags: dict[str, str],
) -> ModelVersion:
    """Log a pyfunc from code under the run and register it as the next version of `name`."""
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(model_file),
            code_paths=[str(code_folder)],
            artifacts=artifacts,
            signature=signature,
            model_config=model_config,
            pip_requirements=requirements,
            input_example=input_example,
        )
    return mlflow.register_model(logged.model_uri, name, tags=tags)


def set_alias(client: MlflowClient, version: ModelVersion, score: Score) -> str:
    """Point `champion`, or else `challenger`, at the version, under a lock. Return the alias."""
    with store_lock():
        aliases = client.get_registered_model(version.name).aliases
        champion = score_of(client.get_model_version(version.name, aliases[CHAMPION])) if CHAMPION in aliases else None
        alias = CHAMPION if deserves_champion(score, champion) else CHALLENGER
        client.set_registered_model_alias(version.name, alias, version.version)
        if alias == CHAMPION and str(aliases.get(CHALLENGER)) == str(version.version):
            client.delete_registered_model_alias(version.name, CHALLENGER)
    return alias


def score_of(version: ModelVersion) -> Score | None:
    """Return the score that `register` wrote on a version; None if somebody else registered it."""
    if TEST_SPLIT_TAG not in version.tags or BITS_PER_BYTE_TAG not in version.tags:
        return None
    return Score(version.tags[TEST_SPLIT_TAG], float(version.tags[BITS_PER_BYTE_TAG]))


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
